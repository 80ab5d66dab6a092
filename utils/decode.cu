// GPT-NeoX(병렬 잔차)의 토큰 하나. 층마다 커널 셋(project, attend, contract)이고 끝에 head가 온다.
// 활성값의 자리 act: [FF + HIDDEN]칸의 위 절반과 아래 절반. 앞의 FF칸은 gelu, 뒤의 HIDDEN칸은 attention의 출력이다.

#define ACT (FF + HIDDEN)
#define PER_THREAD ((HIDDEN + THREADS - 1) / THREADS)
#define A_ROWS ((2 * RANK + ROWS - 1) / ROWS * ROWS)  // LoRA A의 행: fp16/bf16으로 나눈 위 절반과 아래 절반
#define CHUNK 64                                      // attention의 블록 하나가 맡는 위치의 수
#define ATTENDERS 256
#define SPLITS ((CONTEXT + CHUNK - 1) / CHUNK)
#define LANE 16                                       // attention의 레인 하나가 맡는 칸

#define TABLE_BYTES (NF4 ? 32768 : 0)

extern __shared__ char shared[];

// layer norm의 결과를 위, 아래 절반으로 적는다. 합과 제곱합을 함께 모아 동기화가 한 번이다.
template <bool BF>
__device__ __forceinline__ void layer_norm(const float* x, const float (&weight)[PER_THREAD],
                                           const float (&bias)[PER_THREAD], float eps, u16* high, u16* low,
                                           float2* scratch) {
    float value[PER_THREAD];
    float2 sum = {0.f, 0.f};
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        value[j] = i < HIDDEN ? __ldcg(x + i) : 0.f;
        sum.x += value[j], sum.y += value[j] * value[j];
    }
    for (int step = 16; step; step >>= 1)
        sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = scratch[threadIdx.x & WARPS - 1];
    for (int step = WARPS / 2; step; step >>= 1)
        sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
    float mean = sum.x / HIDDEN, scale = rsqrtf(fmaxf(sum.y / HIDDEN - mean * mean, 0.f) + eps);
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i < HIDDEN) store_split<BF>(high + i, low + i, (value[j] - mean) * scale * weight[j] + bias[j]);
    }
}

__device__ __forceinline__ void read_norm(const float* source, float (&target)[PER_THREAD]) {
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        target[j] = i < HIDDEN ? __ldg(source + i) : 0.f;
    }
}

// qkv = W ln1(x) + bias + B A ln1(x) 그리고 act[:FF] = gelu(W ln2(x) + bias). 앞의 qkv_blocks개 블록이 qkv를 맡는다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) project(
    const float* x, float eps, const float* code, const float* adapter, int qkv_blocks, int slots,
    const float* norm1, const float* shift1, const u8* weight1, const void* scale1, const float* group1, float offset1,
    const float* bias1, const u16* lora_a, const float* lora_b, float* qkv,
    const float* norm2, const float* shift2, const u8* weight2, const void* scale2, const float* group2, float offset2,
    const float* bias2, u16* act) {
    typedef Product<Piece<HIDDEN>, HIDDEN, 4> Main;
    typedef Product<WidePiece<ACT_BF16, HIDDEN>, HIDDEN, 2> Lora;
    let_next_kernel_start();
    bool is_qkv = blockIdx.x < qkv_blocks;
    int rows = is_qkv ? 3 * HIDDEN : FF, blocks = is_qkv ? qkv_blocks : gridDim.x - qkv_blocks;
    int block = is_qkv ? blockIdx.x : blockIdx.x - qkv_blocks;
    int first = rows / ROWS * block / blocks, tiles = rows / ROWS * (block + 1) / blocks - first;
    Main product(is_qkv ? Matrix{weight1, scale1, group1, offset1} : Matrix{weight2, scale2, group2, offset2}, first,
                 tiles);
    product.prime();
    Lora lora({(const u8*)lora_a, 0, 0, 0.f}, 0, A_ROWS / ROWS);
    bool adapted = RANK && is_qkv && *adapter != 0.f;
    if (adapted) lora.prime();

    u32* table = (u32*)shared;
    float* partial = (float*)(shared + TABLE_BYTES);
    float* lora_partial = partial + slots * WARPS * ROWS;
    float* codes = lora_partial + A_ROWS * WARPS;
    float* down = codes + 256;
    float2* scratch = (float2*)(down + (RANK + 3) / 4 * 4);
    u16* high = (u16*)(scratch + WARPS);
    float norm[PER_THREAD], shift[PER_THREAD];
    read_norm(is_qkv ? norm1 : norm2, norm);
    read_norm(is_qkv ? shift1 : shift2, shift);
    int row = first * ROWS + threadIdx.x;
    bool has_row = threadIdx.x < tiles * ROWS;
    float row_bias = has_row ? __ldg((is_qkv ? bias1 : bias2) + row) : 0.f;
    if (adapted && has_row) asm volatile("prefetch.global.L2 [%0];" ::"l"(lora_b + row * RANK));
    if (NF4) build_table(table);
    if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    wait_for_previous_kernel();
    layer_norm<ACT_BF16>(x, norm, shift, eps, high, high + HIDDEN, scratch);
    __syncthreads();

    Inputs inputs = {high, high + HIDDEN, table, codes};
    if (adapted) lora.run(inputs, lora_partial);
    product.run(inputs, partial);
    __syncthreads();
    if (adapted) {
        for (int r = threadIdx.x; r < RANK; r += THREADS)
            down[r] = (Lora::row(lora_partial, r) + Lora::row(lora_partial, r + RANK)) * *adapter;
        __syncthreads();
    }
    if (!has_row) return;
    float value = Main::row(partial, threadIdx.x) + row_bias;
    if (is_qkv) {
        if (adapted)
            for (int r = 0; r < RANK; r++) value += __ldg(lora_b + row * RANK + r) * down[r];
        qkv[row] = value;
    } else {
        store_split<ACT_BF16>(act + row, act + ACT + row, 0.5f * value * (1.f + erff(value * 0.70710678f)));
    }
}

__device__ __forceinline__ float rotate(const float* head, const float2* turns, int d) {
    if (d >= ROTARY) return head[d];
    float2 turn = turns[d % (ROTARY / 2)];
    return d < ROTARY / 2 ? head[d] * turn.x - head[d + ROTARY / 2] * turn.y
                          : head[d] * turn.x + head[d - ROTARY / 2] * turn.y;
}

// GROUP칸을 int8로 적고 fp16 scale 하나를 남긴다. 이어진 GROUP개 스레드가 함께 부른다.
__device__ __forceinline__ void store_int8(signed char* cache, u16* scales, size_t index, float value) {
    float largest = fabsf(value);
    for (int step = GROUP / 2; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(__activemask(), largest, step));
    u16 bits = narrow<false>(largest / 127.f);
    float scale = widen<false>(bits);
    cache[index] = (signed char)(scale > 0.f ? fminf(fmaxf(rintf(value / scale), -127.f), 127.f) : 0.f);
    if (index % GROUP == 0) scales[index / GROUP] = bits;
}

__device__ __forceinline__ float int8_at(const uint4& packed, int j) {
    u32 word = j < 4 ? packed.x : j < 8 ? packed.y : j < 12 ? packed.z : packed.w;
    return (float)((int)(word << (3 - j % 4) * 8) >> 24);
}

// 새 토큰의 K, V를 cache에 더하고 attention을 센다. 블록은 머리 하나의 위치 CHUNK개를 맡는다. 머리마다 마지막에 끝난
// 블록이 부분 결과를 합친다. partial: [HEADS][SPLITS][HEAD_DIM + 2], done: [HEADS]는 늘 0으로 되돌려 놓는다.
extern "C" __global__ void __launch_bounds__(ATTENDERS) attend(
    const float* qkv, const float2* turns, const int* state, signed char* keys, u16* key_scales, signed char* values,
    u16* value_scales, float* partial, int* done, u16* act) {
    enum { LANES = HEAD_DIM / LANE, SPAN = LANES <= 2 ? 2 : LANES <= 4 ? 4 : LANES <= 8 ? 8 : 16,
           AT_ONCE = ATTENDERS / SPAN, STEPS = (CHUNK + AT_ONCE - 1) / AT_ONCE };
    __shared__ float query[HEAD_DIM], scores[CHUNK], sums[ATTENDERS / 32][HEAD_DIM];
    __shared__ __align__(16) signed char fresh_key[HEAD_DIM], fresh_value[HEAD_DIM];
    __shared__ u16 fresh_scales[2][HEAD_DIM / GROUP];
    __shared__ bool last;
    int head = blockIdx.x, begin = blockIdx.y * CHUNK, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    int position = state[0];
    if (begin > position) return;
    int end = min(begin + CHUNK, position + 1), part = tid % SPAN, sub = tid / SPAN;
    size_t base = (size_t)head * CONTEXT * HEAD_DIM, fresh = base + (size_t)position * HEAD_DIM;

    // 지난 위치의 K와 V는 앞의 커널과 상관이 없으므로 먼저 읽는다.
    uint4 key[STEPS], value[STEPS];
    u16 key_scale[STEPS], value_scale[STEPS];
    bool present[STEPS];
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int row = begin + sub + s * AT_ONCE;
        present[s] = part < LANES && row < end && sub + s * AT_ONCE < CHUNK;
        if (!present[s] || row == position) continue;
        size_t index = base + (size_t)row * HEAD_DIM + part * LANE;
        key[s] = __ldcg((const uint4*)(keys + index)), value[s] = __ldcg((const uint4*)(values + index));
        key_scale[s] = __ldcg(key_scales + index / GROUP), value_scale[s] = __ldcg(value_scales + index / GROUP);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    const float* source = qkv + head * 3 * HEAD_DIM;
    const float2* now = turns + (size_t)position * (ROTARY / 2);
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        query[d] = rotate(source, now, d) * rsqrtf((float)HEAD_DIM);
        if (end == position + 1) {
            store_int8(fresh_key, fresh_scales[0], d, rotate(source + HEAD_DIM, now, d));
            store_int8(fresh_value, fresh_scales[1], d, source[2 * HEAD_DIM + d]);
        }
    }
    __syncthreads();
    if (end == position + 1 && tid < LANES) {
        size_t index = fresh + tid * LANE;
        *(uint4*)(keys + index) = ((const uint4*)fresh_key)[tid];
        *(uint4*)(values + index) = ((const uint4*)fresh_value)[tid];
        key_scales[index / GROUP] = fresh_scales[0][tid * LANE / GROUP];
        value_scales[index / GROUP] = fresh_scales[1][tid * LANE / GROUP];
    }

    float q[LANE], largest = -1e30f;
    #pragma unroll
    for (int j = 0; j < LANE; j++) q[j] = part < LANES ? query[part * LANE + j] : 0.f;
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int row = begin + sub + s * AT_ONCE;
        if (present[s] && row == position) {
            key[s] = ((const uint4*)fresh_key)[part], value[s] = ((const uint4*)fresh_value)[part];
            key_scale[s] = fresh_scales[0][part * LANE / GROUP], value_scale[s] = fresh_scales[1][part * LANE / GROUP];
        }
        float dot = 0.f;
        if (present[s]) {
            #pragma unroll
            for (int j = 0; j < LANE; j++) dot += q[j] * int8_at(key[s], j);
            dot *= widen<false>(key_scale[s]);
        }
        for (int step = SPAN / 2; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        if (part == 0 && sub + s * AT_ONCE < CHUNK) scores[sub + s * AT_ONCE] = row < end ? dot : -1e30f;
    }
    __syncthreads();
    for (int i = lane; i < CHUNK; i += 32) largest = fmaxf(largest, scores[i]);
    for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    float total = 0.f;
    for (int i = lane; i < CHUNK; i += 32) total += expf(scores[i] - largest);
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);

    float sum[LANE] = {};
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        if (!present[s]) continue;
        float weight = expf(scores[sub + s * AT_ONCE] - largest) * widen<false>(value_scale[s]);
        #pragma unroll
        for (int j = 0; j < LANE; j++) sum[j] += weight * int8_at(value[s], j);
    }
    #pragma unroll
    for (int j = 0; j < LANE; j++) {
        for (int step = SPAN; step < 32; step <<= 1) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
        if (lane < LANES) sums[warp][lane * LANE + j] = sum[j];
    }
    __syncthreads();

    int active = position / CHUNK + 1;
    u16* out = act + FF + head * HEAD_DIM;
    float* mine = partial + ((size_t)head * SPLITS + blockIdx.y) * (HEAD_DIM + 2);
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        float value = 0.f;
        for (int w = 0; w < ATTENDERS / 32; w++) value += sums[w][d];
        if (active == 1) store_split<ACT_BF16>(out + d, out + ACT + d, value / total);
        else mine[d] = value;
    }
    if (active == 1) return;
    if (tid == 0) mine[HEAD_DIM] = largest, mine[HEAD_DIM + 1] = total;
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(done + head, 1) == active - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (tid == 0) done[head] = 0;
    const float* all = partial + (size_t)head * SPLITS * (HEAD_DIM + 2);
    float top = -1e30f, whole = 0.f;
    for (int s = 0; s < active; s++) top = fmaxf(top, __ldcg(all + s * (HEAD_DIM + 2) + HEAD_DIM));
    for (int s = 0; s < active; s++) {
        const float* one = all + s * (HEAD_DIM + 2) + HEAD_DIM;
        whole += __ldcg(one + 1) * expf(__ldcg(one) - top);
    }
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        float value = 0.f;
        for (int s = 0; s < active; s++) {
            const float* one = all + s * (HEAD_DIM + 2);
            value += __ldcg(one + d) * expf(__ldcg(one + HEAD_DIM) - top);
        }
        store_split<ACT_BF16>(out + d, out + ACT + d, value / whole);
    }
}

// x += W_4h_to_h gelu + W_dense attention + bias. NF4에서는 활성값의 위 절반(fp16)만 써서 공유 메모리를 아낀다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) contract(
    float* x, const u16* act, const float* code, const float* bias, int slots,
    const u8* weight1, const void* scale1, const float* group1, float offset1,
    const u8* weight2, const void* scale2, const float* group2, float offset2) {
    typedef Product<Piece<FF>, FF, 4> Down;
    typedef Product<Piece<HIDDEN>, HIDDEN, 2> Dense;
    let_next_kernel_start();
    int first = HIDDEN / ROWS * blockIdx.x / gridDim.x, tiles = HIDDEN / ROWS * (blockIdx.x + 1) / gridDim.x - first;
    Down down({weight1, scale1, group1, offset1}, first, tiles);
    Dense dense({weight2, scale2, group2, offset2}, first, tiles);
    down.prime();
    dense.prime();
    u32* table = (u32*)shared;
    float* partial = (float*)(shared + TABLE_BYTES);
    float* dense_partial = partial + slots * WARPS * ROWS;
    float* codes = dense_partial + slots * WARPS * ROWS;
    u16* inputs = (u16*)(codes + 256);
    int row = first * ROWS + threadIdx.x;
    bool has_row = threadIdx.x < tiles * ROWS;
    float value = has_row ? __ldg(bias + row) : 0.f;
    if (NF4) build_table(table);
    if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    wait_for_previous_kernel();
    #pragma unroll 4
    for (int i = threadIdx.x; i < ACT * (NF4 ? 1 : 2) / 8; i += THREADS)
        ((uint4*)inputs)[i] = __ldcg((const uint4*)act + i);
    if (has_row) value += x[row];
    __syncthreads();
    down.run({inputs, NF4 ? 0 : inputs + ACT, table, codes}, partial);
    dense.run({inputs + FF, NF4 ? 0 : inputs + ACT + FF, table, codes}, dense_partial);
    __syncthreads();
    if (has_row) x[row] = value + Down::row(partial, threadIdx.x) + Dense::row(dense_partial, threadIdx.x);
}

// logits[:VOCAB] = W norm(x). weight의 행은 16의 배수까지 있다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) head(
    const float* x, float eps, const float* norm, const float* shift, const u8* weight, float* logits, int slots) {
    typedef Product<WidePiece<BF16, HIDDEN>, HIDDEN, 4> Main;
    enum { TILES = (VOCAB + ROWS - 1) / ROWS };
    let_next_kernel_start();
    int first = TILES * blockIdx.x / gridDim.x, tiles = TILES * (blockIdx.x + 1) / gridDim.x - first;
    Main product({weight, 0, 0, 0.f}, first, tiles);
    product.prime();
    float* partial = (float*)shared;
    float2* scratch = (float2*)(partial + slots * WARPS * ROWS);
    u16* high = (u16*)(scratch + WARPS);
    float scale[PER_THREAD], bias[PER_THREAD];
    read_norm(norm, scale);
    read_norm(shift, bias);
    wait_for_previous_kernel();
    layer_norm<BF16>(x, scale, bias, eps, high, high + HIDDEN, scratch);
    __syncthreads();
    product.run({high, high + HIDDEN, 0, 0}, partial);
    __syncthreads();
    int row = first * ROWS + threadIdx.x;
    if (threadIdx.x < tiles * ROWS && row < VOCAB) logits[row] = Main::row(partial, threadIdx.x);
}
