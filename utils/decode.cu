// GPT-NeoX(병렬 잔차)의 토큰 하나. 층마다 커널 셋(project, attend, contract)이고 끝에 head가 온다.
// 활성값의 자리 act: [FF + HIDDEN]칸의 위 절반과 아래 절반. 앞의 FF칸은 gelu, 뒤의 HIDDEN칸은 attention의 출력이다.

#define ACT (FF + HIDDEN)
#define PER_THREAD ((HIDDEN + THREADS - 1) / THREADS)
#define A_ROWS ((2 * RANK + ROWS - 1) / ROWS * ROWS)  // LoRA A의 행: fp16/bf16으로 나눈 위 절반과 아래 절반
#define CHUNK 128                                     // attention의 블록 하나가 맡는 위치의 수
#define SPLITS ((CONTEXT + CHUNK - 1) / CHUNK)
#define GROUP 16                                      // KV cache는 16칸마다 fp16 scale을 둔 int8이다

extern __shared__ char shared[];

// layer norm의 결과를 위, 아래 절반으로 적는다. weight와 bias는 미리 읽어 둔다.
template <bool BF>
__device__ __forceinline__ void layer_norm(const float* x, const float (&weight)[PER_THREAD],
                                           const float (&bias)[PER_THREAD], float eps, u16* high, u16* low,
                                           float* scratch) {
    float value[PER_THREAD], sum = 0.f, square = 0.f;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        value[j] = i < HIDDEN ? __ldcg(x + i) : 0.f;
        sum += value[j];
    }
    float mean = block_sum(sum, scratch) / HIDDEN;
    for (int j = 0; j < PER_THREAD; j++)
        if (threadIdx.x + j * THREADS < HIDDEN) square += (value[j] - mean) * (value[j] - mean);
    float scale = rsqrtf(block_sum(square, scratch) / HIDDEN + eps);
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

__device__ __forceinline__ void clear(float* values, int count) {
    for (int i = threadIdx.x; i < count; i += THREADS) values[i] = 0.f;
}

// qkv = W ln1(x) + bias + B A ln1(x) 그리고 act[:FF] = gelu(W ln2(x) + bias). 앞의 qkv_blocks개 블록이 qkv를 맡는다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) project(
    const float* x, float eps, const float* code, const float* adapter, int qkv_blocks, int slots,
    const float* norm1, const float* shift1, const u8* weight1, const void* scale1, const float* group1, float offset1,
    const float* bias1, const u16* lora_a, const float* lora_b, float* qkv,
    const float* norm2, const float* shift2, const u8* weight2, const void* scale2, const float* group2, float offset2,
    const float* bias2, u16* act) {
    let_next_kernel_start();
    bool is_qkv = blockIdx.x < qkv_blocks;
    int rows = is_qkv ? 3 * HIDDEN : FF, blocks = is_qkv ? qkv_blocks : gridDim.x - qkv_blocks;
    int block = is_qkv ? blockIdx.x : blockIdx.x - qkv_blocks;
    int first = rows / ROWS * block / blocks, tiles = rows / ROWS * (block + 1) / blocks - first;
    Matrix matrix = is_qkv ? Matrix{weight1, scale1, group1, offset1} : Matrix{weight2, scale2, group2, offset2};
    const float* bias = is_qkv ? bias1 : bias2;

    u32* table = (u32*)shared;
    float* partial = (float*)(shared + (NF4 ? 32768 : 0));
    float* codes = partial + (slots * ROWS + A_ROWS) * WARPS;
    float* scratch = codes + 256;
    float* down = scratch + 32;
    u16* high = (u16*)(down + (RANK + 3) / 4 * 4);
    u16* low = high + HIDDEN;

    Product<Item, HIDDEN, 0, DEPTH> product(matrix, matrix, first, tiles, rows);
    product.prime();
    Matrix a_matrix = {(const u8*)lora_a, 0, 0, 0.f};
    Product<WideItem<ACT_BF16>, HIDDEN, 0, 2> lora(a_matrix, a_matrix, 0, A_ROWS / ROWS, A_ROWS);
    bool adapted = RANK && is_qkv && *adapter != 0.f;
    if (adapted) lora.prime();
    float norm[PER_THREAD], shift[PER_THREAD];
    read_norm(is_qkv ? norm1 : norm2, norm);
    read_norm(is_qkv ? shift1 : shift2, shift);
    int row = first * ROWS + threadIdx.x;
    float row_bias = threadIdx.x < tiles * ROWS ? __ldg(bias + row) : 0.f;
    if (adapted && threadIdx.x < tiles * ROWS)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(lora_b + row * RANK));
    if (NF4) build_table(table);
    if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    clear(partial, (slots * ROWS + A_ROWS) * WARPS);
    wait_for_previous_kernel();
    layer_norm<ACT_BF16>(x, norm, shift, eps, high, low, scratch);
    __syncthreads();

    Activation input = {high, low};
    if (adapted) lora.template run<false>(input, input, table, codes, partial + slots * ROWS * WARPS);
    product.template run<false>(input, input, table, codes, partial);
    __syncthreads();
    if (adapted) {
        for (int r = threadIdx.x; r < RANK; r += THREADS) {
            const float* a_partial = partial + slots * ROWS * WARPS;
            down[r] = (row_sum(a_partial, r) + row_sum(a_partial, r + RANK)) * *adapter;
        }
        __syncthreads();
    }
    if (threadIdx.x >= tiles * ROWS) return;
    float value = row_sum(partial, threadIdx.x) + row_bias;
    if (is_qkv) {
        if (adapted)
            for (int r = 0; r < RANK; r++) value += __ldg(lora_b + row * RANK + r) * down[r];
        qkv[row] = value;
    } else {
        value = 0.5f * value * (1.f + erff(value * 0.70710678f));
        store_split<ACT_BF16>(act + row, act + ACT + row, value);
    }
}

__device__ __forceinline__ float rotate(const float* head, const float2* turns, int d) {
    if (d >= ROTARY) return head[d];
    float2 turn = turns[d % (ROTARY / 2)];
    return d < ROTARY / 2 ? head[d] * turn.x - head[d + ROTARY / 2] * turn.y
                          : head[d] * turn.x + head[d - ROTARY / 2] * turn.y;
}

// 16칸을 int8로 적고 scale을 남긴다. 이어진 16개 스레드가 함께 부른다.
__device__ __forceinline__ void store_int8(signed char* cache, u16* scales, size_t index, float value) {
    float largest = fabsf(value);
    for (int step = 8; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(__activemask(), largest, step));
    u16 bits = narrow<false>(largest / 127.f);
    float scale = widen<false>(bits);
    cache[index] = (signed char)(scale > 0.f ? fminf(fmaxf(rintf(value / scale), -127.f), 127.f) : 0.f);
    if (index % GROUP == 0) scales[index / GROUP] = bits;
}

// 새 토큰의 K, V를 cache에 더하고 attention을 센다. 블록은 머리 하나의 위치 CHUNK개를 맡는다. 머리마다 마지막에 끝난
// 블록이 부분 결과를 합친다. partial: [HEADS][SPLITS][HEAD_DIM + 2], done: [HEADS]는 늘 0으로 되돌려 놓는다.
extern "C" __global__ void __launch_bounds__(128) attend(
    const float* qkv, const float2* turns, const int* state, signed char* keys, u16* key_scales, signed char* values,
    u16* value_scales, float* partial, int* done, u16* act) {
    enum { LANES = HEAD_DIM / GROUP, SPAN = LANES <= 2 ? 2 : LANES <= 4 ? 4 : LANES <= 8 ? 8 : 16, AT_ONCE = 32 / SPAN };
    __shared__ float query[HEAD_DIM], scores[CHUNK], sums[4][HEAD_DIM], scratch[32];
    __shared__ bool last;
    wait_for_previous_kernel();
    let_next_kernel_start();
    int head = blockIdx.x, position = state[0], begin = blockIdx.y * CHUNK;
    if (begin > position) return;
    int end = min(begin + CHUNK, position + 1), tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const float* source = qkv + head * 3 * HEAD_DIM;
    const float2* now = turns + (size_t)position * (ROTARY / 2);
    size_t base = (size_t)head * CONTEXT * HEAD_DIM, fresh = base + (size_t)position * HEAD_DIM;
    for (int d = tid; d < HEAD_DIM; d += 128) {
        query[d] = rotate(source, now, d) * rsqrtf((float)HEAD_DIM);
        if (end == position + 1) {
            store_int8(keys, key_scales, fresh + d, rotate(source + HEAD_DIM, now, d));
            store_int8(values, value_scales, fresh + d, source[2 * HEAD_DIM + d]);
        }
    }
    __syncthreads();

    int part = lane % SPAN, sub = warp * AT_ONCE + lane / SPAN;
    bool has_part = part < LANES;
    float q[GROUP];
    for (int j = 0; j < GROUP; j++) q[j] = has_part ? query[part * GROUP + j] : 0.f;
    #pragma unroll 4
    for (int row = sub; row < CHUNK; row += 4 * AT_ONCE) {
        float dot = 0.f;
        if (has_part && begin + row < end) {
            size_t index = base + (size_t)(begin + row) * HEAD_DIM + part * GROUP;
            uint4 packed = *(const uint4*)(keys + index);
            const signed char* k = (const signed char*)&packed;
            for (int j = 0; j < GROUP; j++) dot += q[j] * k[j];
            dot *= widen<false>(key_scales[index / GROUP]);
        }
        for (int step = SPAN / 2; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        if (part == 0) scores[row] = begin + row < end ? dot : -1e30f;
    }
    __syncthreads();
    float score = scores[tid], largest = score;
    for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (lane == 0) scratch[warp] = largest;
    __syncthreads();
    largest = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));
    float weight = begin + tid < end ? expf(score - largest) : 0.f;
    scores[tid] = weight;
    float total = block_sum(weight, scratch);  // 동기화를 겸한다

    float sum[GROUP] = {};
    #pragma unroll 4
    for (int row = sub; row < CHUNK; row += 4 * AT_ONCE) {
        if (!has_part || begin + row >= end) continue;
        size_t index = base + (size_t)(begin + row) * HEAD_DIM + part * GROUP;
        uint4 packed = *(const uint4*)(values + index);
        const signed char* v = (const signed char*)&packed;
        float scaled = scores[row] * widen<false>(value_scales[index / GROUP]);
        for (int j = 0; j < GROUP; j++) sum[j] += scaled * v[j];
    }
    for (int j = 0; j < GROUP; j++) {
        for (int step = SPAN; step < 32; step <<= 1) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
        if (lane < LANES) sums[warp][part * GROUP + j] = sum[j];
    }
    __syncthreads();

    int active = position / CHUNK + 1;
    u16* out = act + FF + head * HEAD_DIM;
    float* mine = partial + ((size_t)head * SPLITS + blockIdx.y) * (HEAD_DIM + 2);
    for (int d = tid; d < HEAD_DIM; d += 128) {
        float value = sums[0][d] + sums[1][d] + sums[2][d] + sums[3][d];
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
    for (int d = tid; d < HEAD_DIM; d += 128) {
        float value = 0.f;
        for (int s = 0; s < active; s++) {
            const float* one = all + s * (HEAD_DIM + 2);
            value += __ldcg(one + d) * expf(__ldcg(one + HEAD_DIM) - top);
        }
        store_split<ACT_BF16>(out + d, out + ACT + d, value / whole);
    }
}

// x += W_4h_to_h gelu + W_dense attention + bias. 앞의 행렬은 attend가 끝나기 전에도 곱할 수 있다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) contract(
    float* x, const u16* act, const float* code, const float* bias, int slots,
    const u8* weight1, const void* scale1, const float* group1, float offset1,
    const u8* weight2, const void* scale2, const float* group2, float offset2) {
    let_next_kernel_start();
    int first = HIDDEN / ROWS * blockIdx.x / gridDim.x, tiles = HIDDEN / ROWS * (blockIdx.x + 1) / gridDim.x - first;
    u32* table = (u32*)shared;
    float* partial = (float*)(shared + (NF4 ? 32768 : 0));
    float* codes = partial + slots * ROWS * WARPS;
    Product<Item, FF, HIDDEN, DEPTH> product({weight1, scale1, group1, offset1}, {weight2, scale2, group2, offset2},
                                             first, tiles, HIDDEN);
    product.prime();
    if (NF4) build_table(table);
    if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    clear(partial, slots * ROWS * WARPS);
    __syncthreads();
    product.template run<true>({act, act + ACT}, {act + FF, act + ACT + FF}, table, codes, partial);
    __syncthreads();
    int row = first * ROWS + threadIdx.x;
    if (threadIdx.x < tiles * ROWS) x[row] += row_sum(partial, threadIdx.x) + __ldg(bias + row);
}

// logits[:VOCAB] = W norm(x)
extern "C" __global__ void __launch_bounds__(THREADS, 1) head(
    const float* x, float eps, const float* norm, const float* shift, const u8* weight, float* logits, int slots) {
    let_next_kernel_start();
    enum { TILES = (VOCAB + ROWS - 1) / ROWS };
    int first = TILES * blockIdx.x / gridDim.x, tiles = TILES * (blockIdx.x + 1) / gridDim.x - first;
    float* partial = (float*)shared;
    float* scratch = partial + slots * ROWS * WARPS;
    u16* high = (u16*)(scratch + 32);
    Matrix matrix = {weight, 0, 0, 0.f};
    Product<WideItem<BF16>, HIDDEN, 0, DEPTH> product(matrix, matrix, first, tiles, VOCAB);
    product.prime();
    float scale[PER_THREAD], bias[PER_THREAD];
    read_norm(norm, scale);
    read_norm(shift, bias);
    clear(partial, slots * ROWS * WARPS);
    wait_for_previous_kernel();
    layer_norm<BF16>(x, scale, bias, eps, high, high + HIDDEN, scratch);
    __syncthreads();
    product.template run<false>({high, high + HIDDEN}, {high, high + HIDDEN}, 0, 0, partial);
    __syncthreads();
    int row = first * ROWS + threadIdx.x;
    if (threadIdx.x < tiles * ROWS && row < VOCAB) logits[row] = row_sum(partial, threadIdx.x);
}
