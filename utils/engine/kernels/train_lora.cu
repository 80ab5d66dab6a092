// 학습의 LoRA와, 그것을 함께 곱하도록 푼 가중치. train.cu의 뒤에 온다. 상수는 train.cu의 것과 같다.
//
// 선형층의 입력은 [u | z]로 이어 붙인 폭 columns + tail이고, 쌓은 가중치는 [W | scale * B]다. z = dropout(u) A^T라서
// LoRA가 행렬 곱 하나에 함께 들어간다. 같은 입력을 읽는 선형층들(q, k, v나 gate, up)은 저마다의 z를 tail의 다른 칸에 둔다.

// ---- LoRA ----

// 같은 입력을 읽는 LoRA들(q, k, v나 gate, up). train_kernels.py의 `LoraArgument`와 같은 차례다.
struct Lora {
    const float* a;         // [rank, columns]
    int own, rank, padded;  // 입력 끝의 LoRA 칸에서 첫 칸, r, 8의 배수로 올린 r
    int site, threshold;    // dropout
    float keep_scale;
};
struct Loras { Lora part[3]; };

__device__ __forceinline__ Lora pick(const Loras& loras, int part) {
    return part == 0 ? loras.part[0] : part == 1 ? loras.part[1] : loras.part[2];
}

// A의 이웃한 두 값을 16비트 둘(위, 아래 절반)로 나눈다. 더하면 fp32에 가깝다.
__device__ __forceinline__ void split_two(float first, float second, u32& high, u32& low) {
    high = pack_two(first, second);
    low = pack_two(first - widen<BF16>((u16)(high & 0xffff)), second - widen<BF16>((u16)(high >> 16)));
}

// LORA_ROWS(8)개의 행: z = dropout(u) A^T. 입력 wide [tokens, stride]의 끝(columns + own부터)과 z [tokens, tail]에 적는다.
// grid.y가 LoRA 하나씩을 맡는다. 텐서 코어로 곱한다: 높이 16은 rank 8개의 A의 위와 아래 절반, 너비 8은 행 8개의 u다. 워프마다
// 열을 32개씩 맡아 더하고 끝에 블록이 합친다. 레인 4g + t는 u의 행 g와 A의 행 g에서 이웃한 여덟 열 8t..8t + 7을 읽는다.
// u와 A가 열의 차례를 똑같이 바꾸므로 합은 같다.
extern "C" __global__ void __launch_bounds__(LORA_THREADS) lora_down(
    u16* wide, Loras loras, u16* z, const int* keys, int tokens, int stride, int columns, int tail, int block_len) {
    __shared__ float parts[LORA_THREADS / 32][LORA_ROWS * SPAN];
    Lora lora = pick(loras, blockIdx.y);
    Dropout drop = {keys, block_len, lora.site, lora.threshold, lora.keep_scale};
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    int first_row = blockIdx.x * LORA_ROWS, own_row = min(first_row + group, tokens - 1);
    uint2 seed = drop_seed(drop, own_row);
    for (int first = 0; first < lora.padded; first += SPAN) {
        // rank를 넘는 행은 아무것이나 읽고, 합을 적을 때 0으로 바꾼다
        const float* line = lora.a + (size_t)min(first + group, lora.rank - 1) * columns;
        float sum[4] = {};
#pragma unroll 4
        for (int column = warp * 32 + quarter * 8; column - quarter * 8 < columns; column += LORA_THREADS) {
            u32 u[4] = {};
            Eight a = {};
            if (column < columns) {
                a = load_float(line + column, 0.f);
                *(uint4*)u = *(const uint4*)(wide + (size_t)own_row * stride + column);
                drop_eight(drop, seed, own_row, columns, column, u);
            }
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) split_two(a.v[2 * i], a.v[2 * i + 1], high[i], low[i]);
            mma<BF16>(sum, high[0], low[0], high[1], low[1], u[0], u[1]);
            mma<BF16>(sum, high[2], low[2], high[3], low[3], u[2], u[3]);
        }
        // 레인 4g + t의 넷: rank g와 (행 2t, 행 2t + 1)의 위 절반 둘, 아래 절반 둘
        float* mine = parts[warp] + quarter * 2 * SPAN + group;
        mine[0] = sum[0] + sum[2], mine[SPAN] = sum[1] + sum[3];
        __syncthreads();
        // 스레드 하나가 (행, rank) 하나에서 워프들의 합을 모은다. backward가 쓸 z에도 적는다
        int row = first_row + threadIdx.x / SPAN, r = first + threadIdx.x % SPAN;
        if (threadIdx.x < LORA_ROWS * SPAN && row < tokens) {
            float total = 0.f;
#pragma unroll
            for (int other = 0; other < LORA_THREADS / 32; other++) total += parts[other][threadIdx.x];
            u16 bits = to_bits(r < lora.rank ? total * lora.keep_scale : 0.f);
            wide[(size_t)row * stride + columns + lora.own + r] = bits;
            z[(size_t)row * tail + lora.own + r] = bits;
        }
        __syncthreads();
    }
}

// 행 TILE_ROWS개와 열 TILE_COLUMNS개: 입력의 gradient에 LoRA를 지나온 것을 더하고, A의 gradient의 부분합을 적는다.
//   du += dropout(dz A)      dz는 wide [tokens, stride]의 끝(columns + own부터), du는 앞의 columns칸이다
//   partial[tile][r] = sum_row dz[row][r] dropout(u)[row]      fp32 [tiles, rank, columns]
// 행의 묶음마다 따로 적고 reduce_partials가 차례대로 더하므로, atomic을 쓰지 않고 더하는 순서가 늘 같다.
// weight가 있으면 u는 norm의 앞이고, forward가 남긴 stats로 여기서 norm을 다시 건다. norm의 뒤를 남기지 않아도 된다.
// 워프 하나가 행 16개 x 열 64개를 맡아 두 곱을 텐서 코어로 한다. 곱의 여덟 열이 8n + j(n = 0..7)라서, 레인 4g + t는 u에서
// 행 2t, 2t + 1, 2t + 8, 2t + 9의 이웃한 여덟 열 8g..8g + 7을 읽고, 곱에서는 행 g, g + 8의 열 16t..16t + 15를 받는다.
// 읽는 것은 모두 먼저 띄워 메모리를 한 번만 기다린다.
struct Operands {  // rank SPAN개의 몫
    u32 across[2];   // dz의 행 g, g + 8에서 rank 2t, 2t + 1
    u32 down[2];     // rank g에서 dz의 행 2t, 2t + 1과 2t + 8, 2t + 9
    Eight lines[2];  // A의 행 2t, 2t + 1. rank를 넘는 행에는 dz가 0이라 무엇을 곱해도 된다
};

__device__ __forceinline__ Operands read_operands(const u16* dz, const float* a, int first_row, int tokens, int stride,
                                                  int rank, int first, int columns, int column) {
    int lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
    Operands out = {};
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = first_row + group + i * 8;
        out.across[i] = row < tokens ? *(const u32*)(dz + (size_t)row * stride + first + quarter * 2) : 0;
        if (column < columns) out.lines[i] = load_float(a + (size_t)min(first + quarter * 2 + i, rank - 1) * columns + column, 0.f);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = first_row + quarter * 2 + i % 2 + i / 2 * 8;
        bits[i] = row < tokens ? dz[(size_t)row * stride + first + group] : 0;
    }
    out.down[0] = bits[0] | bits[1] << 16, out.down[1] = bits[2] | bits[3] << 16;
    return out;
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS, 4) lora_backward(
    const u16* u, u16* wide, const float* a, float* partial, const int* keys, const float* weight, const float* bias,
    const float2* stats, int tokens, int u_stride, int stride, int columns, int own, int rank, int block_len, int site,
    int threshold, float keep_scale) {
    __shared__ Four parts[TILE_THREADS / 32][SPAN][TILE_COLUMNS / 4];
    Dropout drop = {keys, block_len, site, threshold, keep_scale};
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    int first_column = blockIdx.x * TILE_COLUMNS, column = first_column + group * 8;
    int first_row = blockIdx.y * TILE_ROWS + warp * 16;
    const u16* dz = wide + columns + own;
    Operands now = read_operands(dz, a, first_row, tokens, stride, rank, 0, columns, column);
    int rows[4];  // u를 읽는 행. 끝을 넘는 행은 마지막 행을 읽는다(dz가 0이다)
    u32 values[4][4], kept = 0;  // dropout(u)의 여덟 값(워드 넷)과, 남긴 자리의 비트
#pragma unroll
    for (int i = 0; i < 4; i++) {
        rows[i] = min(first_row + quarter * 2 + i % 2 + i / 2 * 8, tokens - 1);
        uint4 words = {};
        if (column < columns) words = *(const uint4*)(u + (size_t)rows[i] * u_stride + column);
        values[i][0] = words.x, values[i][1] = words.y, values[i][2] = words.z, values[i][3] = words.w;
    }
    uint4 gradient[2][2] = {};  // du의 행 g, g + 8의 열 16t..16t + 15
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = first_row + group + i / 2 * 8, at = first_column + quarter * 16 + i % 2 * 8;
        if (row < tokens && at < columns) gradient[i / 2][i % 2] = *(const uint4*)(wide + (size_t)row * stride + at);
    }
    if (weight && column < columns) {
        // forward가 읽은 u를 다시 만든다: norm을 걸어 16비트로 반올림한다
        Eight gain = load_float(weight + column, 1.f), shift = load_float(bias ? bias + column : nullptr, 0.f);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 norm = stats[rows[i]];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float low = (widen<BF16>((u16)values[i][j]) - norm.x) * norm.y * gain.v[2 * j] + shift.v[2 * j];
                float high = (widen<BF16>((u16)(values[i][j] >> 16)) - norm.x) * norm.y * gain.v[2 * j + 1] + shift.v[2 * j + 1];
                values[i][j] = pack_two(low, high);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        kept |= drop_eight(drop, drop_seed(drop, rows[i]), rows[i], columns, column, values[i]) << 8 * i;
    for (int first = 0; first < rank; first += SPAN) {
        if (first) now = read_operands(dz, a, first_row, tokens, stride, rank, first, columns, column);
        float sums[8][4] = {};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 pair[2];  // 두 행의 같은 열을 한 워드로 모은 것
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 upper = values[2 * i][j / 2], lower = values[2 * i + 1][j / 2];
                pair[i] = j % 2 ? upper >> 16 | (lower & 0xffff0000u) : (upper & 0xffffu) | lower << 16;
            }
            mma<BF16>(sums[j], now.down[0], 0u, now.down[1], 0u, pair[0], pair[1]);
        }
        // 레인 4g + t의 sums[j][0], [1]은 rank g의 열 16t + j, 16t + 8 + j다
#pragma unroll
        for (int i = 0; i < 4; i++)
            parts[warp][group][quarter * 4 + i] = Four{sums[i % 2 * 4][i / 2], sums[i % 2 * 4 + 1][i / 2],
                                                       sums[i % 2 * 4 + 2][i / 2], sums[i % 2 * 4 + 3][i / 2]};
        float back[8][4] = {};  // dz A
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 high, low;
            split_two(now.lines[0].v[j], now.lines[1].v[j], high, low);
            mma<BF16>(back[j], now.across[0], now.across[1], now.across[0], now.across[1], high, low);
        }
        // dropout의 backward는 forward에서 곱한 배수를 다시 곱하는 것이다. 남긴 자리의 비트는 그 값을 읽은 레인에 있다
#pragma unroll
        for (int side = 0; side < 2; side++) {
            u32 found = __shfl_sync(~0u, kept, (quarter * 2 + side) * 4 + group / 2) >> group % 2 * 8;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Eight total = load((const u16*)&gradient[half][side]);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    total.v[j] += back[j][half * 2 + side] * (found >> (half * 16 + j) & 1 ? keep_scale : 0.f);
                store((u16*)&gradient[half][side], total);
            }
        }
        __syncthreads();
        int r = threadIdx.x / (TILE_COLUMNS / 4), four = threadIdx.x % (TILE_COLUMNS / 4);
        if (first + r < rank && first_column + four * 4 < columns) {
            Four total = {};
#pragma unroll
            for (int other = 0; other < TILE_THREADS / 32; other++)
#pragma unroll
                for (int i = 0; i < 4; i++) total.v[i] += parts[other][r][four].v[i];
#pragma unroll
            for (int i = 0; i < 4; i++) total.v[i] *= keep_scale;
            *(Four*)(partial + ((size_t)blockIdx.y * rank + first + r) * columns + first_column + four * 4) = total;
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = first_row + group + i / 2 * 8, at = first_column + quarter * 16 + i % 2 * 8;
        if (row < tokens && at < columns) *(uint4*)(wide + (size_t)row * stride + at) = gradient[i / 2][i % 2];
    }
}

// gradient [count] += 부분합 [tiles, count]의 합. 블록 하나가 fp32 128개를 맡고, 워프들이 묶음을 나누어 더한 다음 워프의
// 순서대로 더한다. 더하는 순서가 늘 같으므로 두 번 계산하면 비트까지 같다.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) reduce_partials(const float* partial, float* gradient,
                                                                          int tiles, int count) {
    __shared__ Four parts[SUM_THREADS / 32][32];
    int lane = threadIdx.x % 32, group = threadIdx.x / 32, at = (blockIdx.x * 32 + lane) * 4;
    Four total = {};
    if (at < count) {
#pragma unroll 8
        for (int tile = group; tile < tiles; tile += SUM_THREADS / 32) {
            Four part = *(const Four*)(partial + (size_t)tile * count + at);
#pragma unroll
            for (int i = 0; i < 4; i++) total.v[i] += part.v[i];
        }
    }
    parts[group][lane] = total;
    __syncthreads();
    if (group != 0 || at >= count) return;
    // 앞의 micro-step이 남긴 gradient에 이어서 더한다
    Four sum = *(const Four*)(gradient + at);
    for (int other = 0; other < SUM_THREADS / 32; other++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum.v[i] += parts[other][lane].v[i];
    *(Four*)(gradient + at) = sum;
}

// ---- 가중치 ----

// NF4를 16비트로 푼다. 값 = levels[4비트] * absmax이고, 값 64개가 absmax 하나를 함께 쓴다. absmax도 8비트로 양자화되어
// 있으면(absmax8이 null이 아니면) code[absmax8] * absmax[256개마다 하나] + offset으로 함께 푼다.
// 출력 행의 폭은 stride이고, count 뒤의 일은 행의 끝 tail칸에 LoRA의 B [rows, rank]를 scale을 곱해 적는 것이다. 자기의
// 칸은 own부터 rank개이고 나머지는 0이다. 한 thread가 네 곳을 맡아 읽기 넷을 한꺼번에 띄운다.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) dequantize(
    const u8* packed, const u8* absmax8, const float* absmax, const float* code, const float* offset,
    const float* levels, const float* lora_b, u16* out, int count, int columns, int stride, int extra, int tail, int own,
    int rank, float scale) {
    __shared__ float table[16];
    int start = blockIdx.x * 4 * FLAT_THREADS + threadIdx.x, per_row = columns / 8;
    float inverse = 1.f / per_row;
    u32 bytes[4];
    float top[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int index = start + i * FLAT_THREADS;
        if (index < count) {
            bytes[i] = __ldcs((const u32*)packed + index);  // 한 번만 읽으므로 L2에 남기지 않는다
            // 일 하나가 값 여덟(4바이트)이라, 일 여덟이 absmax 블록 하나(64개)를 함께 쓴다
            int block = index / 8;
            top[i] = absmax8 ? code[absmax8[block]] * absmax[block / 256] + *offset : absmax[block];
        }
    }
    if (threadIdx.x < 16) table[threadIdx.x] = levels[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int index = start + i * FLAT_THREADS;
        Eight value;
        size_t at = (size_t)index * 8;
        if (index < count) {
            // 앞의 값이 바이트의 위쪽 4비트에 있다. 4비트 수의 네 배가 곧 표에서의 자리(바이트)다
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 high = bytes[i] >> (8 * j + 2) & 60, low = j ? bytes[i] >> (8 * j - 2) & 60 : bytes[i] << 2 & 60;
                value.v[2 * j] = *(const float*)((const char*)table + high) * top[i];
                value.v[2 * j + 1] = *(const float*)((const char*)table + low) * top[i];
            }
            int row = (int)(index * inverse);  // 정수의 나누기는 느리다. 어림한 행은 많아야 하나 어긋난다
            row += (row + 1) * per_row <= index;
            row -= row * per_row > index;
            at += (size_t)row * (stride - columns);
        } else if (index < count + extra) {
            // 행의 끝 tail칸: 제 LoRA의 칸에는 scale * B, 다른 LoRA의 칸에는 0이다
            int row = (index - count) / (tail / 8), first = (index - count) % (tail / 8) * 8;
#pragma unroll
            for (int r = 0; r < 8; r++) {
                int mine = first + r - own;
                value.v[r] = mine >= 0 && mine < rank ? lora_b[(size_t)row * rank + mine] * scale : 0.f;
            }
            at = (size_t)row * stride + columns + first;
        } else {
            continue;
        }
        store(out + at, value);
    }
}
