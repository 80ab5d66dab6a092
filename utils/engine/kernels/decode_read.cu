// 질문을 읽을 때의 행렬 곱: 토큰 여럿에 선형층 하나를 곱한다. 양자화된 가중치를 풀면서 곱하므로 푼 것을 둘 메모리가 없다.
//
// 블록 하나가 출력 행 16 * row_warps개 x 토큰 TOKENS개를 맡는다. 워프 하나는 행 16개를 맡고, 남는 워프들은 칸을 나누어 맡아
// 끝에 차례대로 더한다. 나누는 법이 토큰의 수와 상관이 없어서, 질문 하나를 읽든 여럿을 함께 읽든 비트까지 같다.
//
// 칸 64개(NF4의 절댓값 블록 하나)가 단위다. 레인 4g + t는 행 g와 g + 8, 토큰 g의 이어진 16칸을 맡는다: 텐서 코어가 더하는
// 칸의 차례는 가중치와 활성값이 같기만 하면 된다. 활성값은 STAGES단위 앞서 공유 메모리로 베껴 둔다.

#define READ_WARPS (READERS / 32)
#define READ_CHUNKS (READ_UNIT / 8) // 한 토큰의 한 단위에 든 16바이트의 수

// 가중치의 조각(행 16개 x 칸 64개). pairs(m)은 텐서 코어의 m번째 곱에 넣는 것, scale은 다 더한 뒤 위와 아래 행에 곱하는 것.
template <bool BF> struct WideRead {
    enum { BYTES = READ_UNIT * 2, SWAPPED = 1 };  // 행 하나의 바이트, 공유 메모리에서 홀수 행의 16바이트를 짝끼리 바꾸어 두는지
    uint4 top[2], low[2];

    // 공유 메모리에 둔 행들 [행][BYTES]에서 row번째와 그 아래 여덟째 행을 읽는다.
    __device__ __forceinline__ void take(const char* rows, int row) {
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const char* source = rows + row * BYTES + ((threadIdx.x & 3) * 2 + h ^ row & 1) * 16;
            top[h] = *(const uint4*)source, low[h] = *(const uint4*)(source + 8 * BYTES);
        }
    }
    __device__ __forceinline__ void load(const Matrix& m, int top_row, int low_row, int column, int columns) {
        const u8* source = m.weight + (column + (threadIdx.x & 3) * 16) * 2;
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = load_weight(source + (size_t)top_row * columns * 2 + h * 16);
            low[h] = load_weight(source + (size_t)low_row * columns * 2 + h * 16);
        }
    }
    __device__ __forceinline__ void pairs(int m, u32 (&a)[4]) const {
        const uint4 &t = top[m / 2], &l = low[m / 2];
        a[0] = m % 2 ? t.z : t.x, a[1] = m % 2 ? l.z : l.x, a[2] = m % 2 ? t.w : t.y, a[3] = m % 2 ? l.w : l.y;
    }
    __device__ __forceinline__ float2 scale() const { return {1.f, 1.f}; }
};

struct Int8Read {
    enum { BYTES = READ_UNIT, SWAPPED = 0 };
    uint4 top, low;

    __device__ __forceinline__ void take(const char* rows, int row) {
        const char* source = rows + row * BYTES + (threadIdx.x & 3) * 16;
        top = *(const uint4*)source, low = *(const uint4*)(source + 8 * BYTES);
    }
    __device__ __forceinline__ void load(const Matrix& m, int top_row, int low_row, int column, int columns) {
        const u8* source = m.weight + column + (threadIdx.x & 3) * 16;
        top = load_weight(source + (size_t)top_row * columns);
        low = load_weight(source + (size_t)low_row * columns);
    }
    __device__ __forceinline__ void pairs(int m, u32 (&a)[4]) const {
        uint2 t = int8_to_fp16(m == 0 ? top.x : m == 1 ? top.y : m == 2 ? top.z : top.w);
        uint2 l = int8_to_fp16(m == 0 ? low.x : m == 1 ? low.y : m == 2 ? low.z : low.w);
        a[0] = t.x, a[1] = l.x, a[2] = t.y, a[3] = l.y;
    }
    __device__ __forceinline__ float2 scale() const { return {1.f, 1.f}; }
};

struct Nf4Read {
    enum { BYTES = READ_UNIT / 2, SWAPPED = 0 };
    uint2 top, low;
    float2 top_scale, low_scale;  // 이중 양자화면 (8비트 절댓값, 그 묶음의 절댓값), 아니면 (절댓값, 0)
    float offset;

    __device__ __forceinline__ void take(const char* rows, int row) {
        const char* source = rows + row * BYTES + (threadIdx.x & 3) * 8;
        top = *(const uint2*)source, low = *(const uint2*)(source + 8 * BYTES);
    }
    __device__ __forceinline__ static float2 load_scale(const Matrix& m, size_t at) {
#if DOUBLE_QUANT
        return {__uint_as_float(__ldg((const u8*)m.scale + (at >> 5))), __ldg(m.group + (at >> 13))};
#else
        return {__ldg((const float*)m.scale + (at >> 5)), 0.f};
#endif
    }
    __device__ __forceinline__ void load(const Matrix& m, int top_row, int low_row, int column, int columns) {
        size_t above = ((size_t)top_row * columns + column) / 2, below = ((size_t)low_row * columns + column) / 2;
        top = load_weight8(m.weight + above + (threadIdx.x & 3) * 8);
        low = load_weight8(m.weight + below + (threadIdx.x & 3) * 8);
        top_scale = load_scale(m, above), low_scale = load_scale(m, below);
        offset = m.offset;
    }
    __device__ __forceinline__ void pairs(int m, u32 (&a)[4]) const {
        u32 lane = (threadIdx.x & 31) * 4, t = m / 2 ? top.y : top.x, l = m / 2 ? low.y : low.x;
        if (m % 2 == 0) a[0] = pair_at<0>(t, lane), a[1] = pair_at<0>(l, lane), a[2] = pair_at<1>(t, lane), a[3] = pair_at<1>(l, lane);
        else a[0] = pair_at<2>(t, lane), a[1] = pair_at<2>(l, lane), a[2] = pair_at<3>(t, lane), a[3] = pair_at<3>(l, lane);
    }
    __device__ __forceinline__ static float decode(float2 one, float offset) {
#if DOUBLE_QUANT
        return __uint_as_float(shared_word<READ_CODES_AT>(__float_as_uint(one.x) * 4)) * one.y + offset;
#else
        return one.x;
#endif
    }
    __device__ __forceinline__ float2 scale() const { return {decode(top_scale, offset), decode(low_scale, offset)}; }
};

#if WEIGHT == NF4_WEIGHT
typedef Nf4Read ReadPiece;
#elif WEIGHT == INT8_WEIGHT
typedef Int8Read ReadPiece;
#else
typedef WideRead<ACT_BF16> ReadPiece;
#endif

// 활성값의 단위 하나 [READ_TOKENS][READ_CHUNKS]에서 16바이트의 자리. 홀수 토큰은 이웃한 둘의 자리를 바꾸어, 텐서 코어에 넣으려고 읽을 때
// 은행이 부딪치지 않는다.
__device__ __forceinline__ u32 chunk_place(int token, int chunk) { return (token * READ_CHUNKS + (chunk ^ token & 1)) * 16; }

// 16비트 x [tokens][columns]와 행렬(이어 놓은 셋까지)의 곱. acc는 이 워프가 맡은 [행 16][토큰 64]의 합이고, 칸을 나누어 맡은
// 워프들 가운데 첫 워프만 다 더한 것을 얻는다. 그 워프인지를 돌려준다.
template <class T>
__device__ __forceinline__ bool read_job(const u16* x, const Matrix& matrix, int tile, int rows, int columns,
                                         int first_token, int tokens, int row_warps, float (&acc)[READ_TOKENS / 8][4]) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int share_shift = row_warps == 8 ? 0 : row_warps == 4 ? 1 : 2, shares = 1 << share_shift;
    int share = warp / row_warps, units = columns / READ_UNIT, most = units + shares - 1 >> share_shift;
    int begin = units * share >> share_shift, end = units * (share + 1) >> share_shift;
    int top_row = min(tile * ROWS + g, rows - 1), low_row = min(tile * ROWS + 8 + g, rows - 1);
    char* inputs = shared + (READ_INPUTS_AT - shared_address(shared));
    u32 share_bytes = READ_TOKENS * READ_UNIT * 2, stage_bytes = share_bytes * shares;

// 스레드는 토큰 둘의 같은 16바이트를 베낀다
    enum { HALF = READERS / READ_CHUNKS, COPIES = READ_TOKENS / HALF };
    int chunk = threadIdx.x % READ_CHUNKS, own = threadIdx.x / READ_CHUNKS;
    const u16* sources[COPIES];
    #pragma unroll
    for (int k = 0; k < COPIES; k++)
        sources[k] = x + (size_t)min(first_token + own + k * HALF, tokens - 1) * columns + chunk * 8;
    auto copy = [&](int step) {  // 나누어 맡은 쪽마다 step번째 단위
        char* stage = inputs + step % READ_STAGES * stage_bytes;
        for (int part = 0; part < shares; part++) {
            int unit = (units * part >> share_shift) + step;
            if (unit >= units * (part + 1) >> share_shift) continue;
            #pragma unroll
            for (int k = 0; k < COPIES; k++)
                copy_async(stage + part * share_bytes + chunk_place(own + k * HALF, chunk), sources[k] + unit * READ_UNIT);
        }
    };
    T piece[2];
    #pragma unroll
    for (int d = 0; d < 2; d++)
        if (begin + d < end) piece[d].load(matrix, top_row, low_row, (begin + d) * READ_UNIT, columns);
    #pragma unroll 1
    for (int step = 0; step < READ_STAGES - 1; step++) {
        if (step < most) copy(step);
        end_of_copies();
    }
    #pragma unroll
    for (int j = 0; j < READ_TOKENS / 8; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    for (int base = 0; base < most; base += 2) {
        #pragma unroll
        for (int d = 0; d < 2; d++) {
            int step = base + d;
            if (step >= most) break;
            wait_for_copies<READ_STAGES - 2>();
            __syncthreads();  // 베낀 것이 모두에게 보이고, 다음에 덮을 자리를 모두 다 읽었다
            if (step + READ_STAGES - 1 < most) copy(step + READ_STAGES - 1);
            end_of_copies();
            if (begin + step >= end) continue;
            const char* source = inputs + step % READ_STAGES * stage_bytes + share * share_bytes;
            float c[READ_TOKENS / 8][4] = {};
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 a[2][4];
                piece[d].pairs(h * 2, a[0]), piece[d].pairs(h * 2 + 1, a[1]);
                #pragma unroll
                for (int j = 0; j < READ_TOKENS / 8; j++) {
                    uint4 b = *(const uint4*)(source + chunk_place(j * 8 + g, t * 2 + h));
                    mma<ACT_BF16>(c[j], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
                    mma<ACT_BF16>(c[j], a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
                }
            }
            float2 scale = piece[d].scale();
            #pragma unroll
            for (int j = 0; j < READ_TOKENS / 8; j++)
                acc[j][0] += c[j][0] * scale.x, acc[j][1] += c[j][1] * scale.x, acc[j][2] += c[j][2] * scale.y,
                    acc[j][3] += c[j][3] * scale.y;
            if (begin + step + 2 < end) piece[d].load(matrix, top_row, low_row, (begin + step + 2) * READ_UNIT, columns);
        }
    }
    wait_for_copies<0>();
    __syncthreads();
// 칸을 나누어 맡은 워프들의 합을 정해진 차례로 더한다
    float* sums = (float*)inputs;
    if (share)
        #pragma unroll
        for (int i = 0; i < READ_TOKENS / 2; i++) sums[((warp - row_warps) * (READ_TOKENS / 2) + i) * 32 + lane] = acc[i / 4][i % 4];
    __syncthreads();
    if (share) return false;
    for (int other = 0; other < shares - 1; other++)
        #pragma unroll
        for (int i = 0; i < READ_TOKENS / 2; i++)
            acc[i / 4][i % 4] += sums[((other * row_warps + warp) * (READ_TOKENS / 2) + i) * 32 + lane];
    return true;
}

// LoRA의 아래쪽 곱 z [tokens][rows] = A x. 배율(IN_SCALE)은 곱해진 그대로이고, 어댑터가 꺼져 있으면 0이다. 행이 적어 블록도 적으므로
// 블록의 워프들이 칸을 나누어 빨리 끝낸다.
//   rows: 나란한 행렬의 수 x LORA_ROWS. grid (rows / ROWS, tokens / 8).
extern "C" __global__ void __launch_bounds__(THREADS) read_lora(const u16* x, Matrix a, int rows, int columns, int tokens,
                                                                const float* adapter, u16* z) {
    __shared__ float sums[WARPS][4][32];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int row = blockIdx.x * ROWS + g, token = blockIdx.y * 8;
    const u16* source = x + (size_t)min(token + g, tokens - 1) * columns + t * 16;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll 2
    for (int column = warp * READ_UNIT; column < columns; column += WARPS * READ_UNIT) {
        WideRead<ACT_BF16> piece;
        piece.load(a, min(row, rows - 1), min(row + 8, rows - 1), column, columns);
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            uint4 b = __ldg((const uint4*)(source + column + h * 8));
            u32 in[2][4];
            piece.pairs(h * 2, in[0]), piece.pairs(h * 2 + 1, in[1]);
            mma<ACT_BF16>(c, in[0][0], in[0][1], in[0][2], in[0][3], b.x, b.y);
            mma<ACT_BF16>(c, in[1][0], in[1][1], in[1][2], in[1][3], b.z, b.w);
        }
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][i][lane] = c[i];
    __syncthreads();
// 워프 넷이 합의 네 칸을 하나씩 맡아 정해진 차례로 더한다
    if (warp >= 4) return;
    float sum = 0.f;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w][warp][lane];
    row += warp / 2 * 8, token += t * 2 + warp % 2;
    if (row < rows && token < tokens) z[(size_t)token * rows + row] = narrow<ACT_BF16>(sum * *adapter);
}

// 한 워프가 맡은 [행 16][토큰 64]의 합을 마무리해 적는다: 행마다의 배율, LoRA의 위쪽 곱, bias. row: 이어 놓은 행렬들에서의 첫 행.
__device__ __forceinline__ void finish_read(const Linear& linear, int row, int part, int first, int rows, int tokens,
                                            const u16* z, int z_rows, u16* out, float (&acc)[READ_TOKENS / 8][4]) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (WEIGHT == INT8_WEIGHT) {
        float above = __ldg(linear.row_scale + row + g), below = __ldg(linear.row_scale + row + 8 + g);
        #pragma unroll
        for (int j = 0; j < READ_TOKENS / 8; j++) acc[j][0] *= above, acc[j][1] *= above, acc[j][2] *= below, acc[j][3] *= below;
    }
    if (z) {
// B z도 텐서 코어로 더한다. r을 16까지 0으로 채운다
        for (int r = 0; r < RANK; r += 16) {
            auto pair = [&](int from, int at) {
                const float* b = linear.lora_b + (size_t)from * RANK + at;
                return narrow<ACT_BF16>(at < RANK ? __ldg(b) : 0.f) | (u32)narrow<ACT_BF16>(at + 1 < RANK ? __ldg(b + 1) : 0.f) << 16;
            };
            u32 a[4] = {pair(row + g, r + t * 2), pair(row + 8 + g, r + t * 2), pair(row + g, r + 8 + t * 2),
                        pair(row + 8 + g, r + 8 + t * 2)};
            #pragma unroll
            for (int j = 0; j < READ_TOKENS / 8; j++) {
                const u16* in = z + (size_t)min(first + j * 8 + g, tokens - 1) * z_rows + part * LORA_ROWS + r + t * 2;
                mma<ACT_BF16>(acc[j], a[0], a[1], a[2], a[3], *(const u32*)in, r + 8 < LORA_ROWS ? *(const u32*)(in + 8) : 0);
            }
        }
    }
    float above = linear.bias ? __ldg(linear.bias + row + g) : 0.f, below = linear.bias ? __ldg(linear.bias + row + 8 + g) : 0.f;
    #pragma unroll
    for (int i = 0; i < READ_TOKENS / 2; i++) {
        int at = row + g + i % 4 / 2 * 8, token = first + i / 4 * 8 + t * 2 + i % 2;
        if (token < tokens)
            out[(size_t)token * rows + at] = narrow<BF16>(acc[i / 4][i % 4] * (1.f / IN_SCALE) + (i % 4 / 2 ? below : above));
    }
}

// out [tokens][rows] = x W^T + bias + B z. 나란한 행렬 셋까지를 이어 놓은 것이고, rows0과 rows1은 앞의 둘의 행의 수다.
//   x: 16비트(ACT_BF16) [tokens][columns], IN_SCALE을 곱한 것. z: 널이면 어댑터가 없다. out: 16비트(BF16).
extern "C" __global__ void __launch_bounds__(READERS, 2) read_linear(const u16* x, Linear linear, int rows0, int rows1,
                                                                  int rows, int columns, int tokens, int row_warps,
                                                                  const float* code, const u16* z, int z_rows, u16* out) {
    int warp = threadIdx.x >> 5, first = blockIdx.y * READ_TOKENS;
    if (WEIGHT == NF4_WEIGHT) build_table<READERS>((u32*)space_begin());
    if (DOUBLE_QUANT) ((float*)(space_begin() + TABLE_BYTES))[threadIdx.x] = __ldg(code + threadIdx.x);
    int row = (blockIdx.x * row_warps + warp % row_warps) * ROWS;
    bool spare = row >= rows;  // 남는 워프는 첫 묶음을 헛되이 곱한다
    if (spare) row = 0;
    int part = (row >= rows0) + (row >= rows0 + rows1), part_begin = part == 0 ? 0 : part == 1 ? rows0 : rows0 + rows1;
    int part_rows = part == 0 ? rows0 : part == 1 ? rows1 : rows - part_begin;
    Matrix matrix = linear.part[0];
    if (part == 1) matrix = linear.part[1];
    if (part == 2) matrix = linear.part[2];
    float acc[READ_TOKENS / 8][4];
    bool has_sum = read_job<ReadPiece>(x, matrix, (row - part_begin) / ROWS, part_rows, columns, first, tokens,
                                       row_warps, acc);
    if (has_sum && !spare) finish_read(linear, row, part, first, rows, tokens, z, z_rows, out, acc);
}

// 이어 놓은 행렬 셋까지에서 행이 든 것: part와 그 안의 행.
struct ReadPlace {
    int part, row;

    __device__ __forceinline__ ReadPlace(int row, int rows0, int rows1)
        : part((row >= rows0) + (row >= rows0 + rows1)), row(row - (part == 0 ? 0 : part == 1 ? rows0 : rows0 + rows1)) {}
    __device__ __forceinline__ Matrix matrix(const Linear& linear) const {
        Matrix matrix = linear.part[0];
        if (part == 1) matrix = linear.part[1];
        if (part == 2) matrix = linear.part[2];
        return matrix;
    }
};

// `read_linear`와 같은 것을 토큰이 많을 때 한다. 블록 하나가 행 MANY_ROWS개 x 토큰 MANY_TOKENS개, 워프 하나가 행 32개 x 토큰 64개를
// 맡아, 푼 가중치와 공유 메모리에서 읽은 활성값을 두 배씩 쓴다. 가중치도 공유 메모리로 베껴 둔다. 더하는 차례는 read_linear와
// 같다: 칸을 2^share_shift개로 나누어 차례로 세고, 그 합들을 차례로 더한다. 그래서 비트까지 같다.
struct ManySpace {  // 단위 하나의 자리: 활성값 | 가중치 | 절댓값
    enum { WEIGHTS = MANY_TOKENS * READ_UNIT * 2, SCALES = WEIGHTS + MANY_ROWS * ReadPiece::BYTES,
           UNIT = SCALES + MANY_ROWS * 4 };

    __device__ __forceinline__ static char* unit(char* inputs, int unit) { return inputs + unit % READ_STAGES * UNIT; }
};

extern "C" __global__ void __launch_bounds__(READERS, 1) read_many(const u16* x, Linear linear, int rows0, int rows1,
                                                                int rows, int columns, int tokens, int share_shift,
                                                                const float* code, const u16* z, int z_rows, u16* out) {
    typedef ReadPiece T;
    enum { TOKEN_COPIES = MANY_TOKENS * READ_CHUNKS / READERS, TOKEN_STEP = READERS / READ_CHUNKS,
           CHUNKS = T::BYTES / 16, ROW_COPIES = MANY_ROWS * CHUNKS / READERS, ROW_STEP = READERS / CHUNKS, SETS8 = READ_TOKENS / 8 };
    int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3, units = columns / READ_UNIT;
    int first = blockIdx.y * MANY_TOKENS, first_row = blockIdx.x * MANY_ROWS;
    char* inputs = shared + (READ_INPUTS_AT - shared_address(shared));
    int chunk = tid % READ_CHUNKS, own = tid / READ_CHUNKS, row_chunk = tid % CHUNKS, own_row = tid / CHUNKS;
    const u8* row_sources[ROW_COPIES];
    #pragma unroll
    for (int k = 0; k < ROW_COPIES; k++) {
        ReadPlace place(min(first_row + own_row + k * ROW_STEP, rows - 1), rows0, rows1);
        row_sources[k] = place.matrix(linear).weight + (size_t)place.row * units * T::BYTES + row_chunk * 16;
    }
    auto copy = [&](int unit) {
        char* place = ManySpace::unit(inputs, unit);
        #pragma unroll
        for (int k = 0; k < TOKEN_COPIES && unit < units; k++)
            copy_async(place + chunk_place(own + k * TOKEN_STEP, chunk),
                       x + (size_t)min(first + own + k * TOKEN_STEP, tokens - 1) * columns + chunk * 8 + unit * READ_UNIT);
        #pragma unroll
        for (int k = 0; k < ROW_COPIES && unit < units; k++) {
            int row = own_row + k * ROW_STEP;
            copy_async(place + ManySpace::WEIGHTS + row * T::BYTES + (T::SWAPPED ? row_chunk ^ row & 1 : row_chunk) * 16,
                       row_sources[k] + (size_t)unit * T::BYTES);
        }
        end_of_copies();
    };
    #pragma unroll 1
    for (int unit = 0; unit < READ_STAGES - 1; unit++) copy(unit);
    if (WEIGHT == NF4_WEIGHT) build_table<READERS>((u32*)space_begin());
    if (DOUBLE_QUANT) ((float*)(space_begin() + TABLE_BYTES))[tid] = __ldg(code + tid);
    __syncthreads();
#if WEIGHT == NF4_WEIGHT
// 절댓값은 스레드 하나가 행 하나의 것을 한 단위 앞서 풀어 둔다
    ReadPlace mine(min(first_row + tid % MANY_ROWS, rows - 1), rows0, rows1);
    Matrix scaled = mine.matrix(linear);
    auto load_scale = [&](int unit) {
        return Nf4Read::load_scale(scaled, ((size_t)mine.row * units + min(unit, units - 1)) * T::BYTES);
    };
    float2 next = load_scale(0);
    auto store_scale = [&](int unit) {
        if (tid < MANY_ROWS)
            ((float*)(ManySpace::unit(inputs, unit) + ManySpace::SCALES))[tid] = Nf4Read::decode(next, scaled.offset);
        next = load_scale(unit + 1);
    };
    store_scale(0);
#endif
    int own_tokens = warp % 2 * READ_TOKENS, own_rows = warp / 2 * 2 * ROWS;
    float total[2][SETS8][4] = {}, acc[2][SETS8][4] = {};
    int share = 1;  // 지금 세는 것의 끝을 찾는 번호
    #pragma unroll 1
    for (int unit = 0; unit < units; unit++) {
        wait_for_copies<READ_STAGES - 2>();
        __syncthreads();
        copy(unit + READ_STAGES - 1);
#if WEIGHT == NF4_WEIGHT
        store_scale(unit + 1);
#endif
        const char* place = ManySpace::unit(inputs, unit);
        T piece[2];
        #pragma unroll
        for (int r = 0; r < 2; r++) piece[r].take(place + ManySpace::WEIGHTS, own_rows + r * ROWS + g);
        float c[2][SETS8][4] = {};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 a[2][2][4];
            #pragma unroll
            for (int r = 0; r < 2; r++) piece[r].pairs(h * 2, a[r][0]), piece[r].pairs(h * 2 + 1, a[r][1]);
            #pragma unroll
            for (int j = 0; j < SETS8; j++) {
                uint4 b = *(const uint4*)(place + chunk_place(own_tokens + j * 8 + g, t * 2 + h));
                #pragma unroll
                for (int r = 0; r < 2; r++) mma<ACT_BF16>(c[r][j], a[r][0][0], a[r][0][1], a[r][0][2], a[r][0][3], b.x, b.y);
                #pragma unroll
                for (int r = 0; r < 2; r++) mma<ACT_BF16>(c[r][j], a[r][1][0], a[r][1][1], a[r][1][2], a[r][1][3], b.z, b.w);
            }
        }
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            float above = 1.f, below = 1.f;
#if WEIGHT == NF4_WEIGHT
            const float* scales = (const float*)(place + ManySpace::SCALES) + own_rows + r * ROWS + g;
            above = scales[0], below = scales[8];
#endif
            #pragma unroll
            for (int j = 0; j < SETS8; j++)
                acc[r][j][0] += c[r][j][0] * above, acc[r][j][1] += c[r][j][1] * above,
                    acc[r][j][2] += c[r][j][2] * below, acc[r][j][3] += c[r][j][3] * below;
        }
        if (unit + 1 < units * share >> share_shift) continue;
// 나누어 맡은 한 쪽이 끝났다
        #pragma unroll
        for (int i = 0; i < READ_TOKENS; i++) {
            float &one = acc[i * 2 / READ_TOKENS][i / 4 % SETS8][i % 4], &sum = total[i * 2 / READ_TOKENS][i / 4 % SETS8][i % 4];
            sum = share > 1 ? sum + one : one, one = 0.f;
        }
        share++;
    }
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first_row + own_rows + r * ROWS;
        if (row < rows)
            finish_read(linear, row, ReadPlace(row, rows0, rows1).part, first + own_tokens, rows, tokens, z, z_rows, out, total[r]);
    }
}
