// GPT-NeoX(병렬 잔차)의 토큰 하나. 층마다 커널 셋(project, attend, contract)이고 끝에 head가 온다.

#define PER_THREAD ((HIDDEN + THREADS - 1) / THREADS)
#define A_ROWS ((2 * RANK + ROWS - 1) / ROWS * ROWS)  // LoRA A의 행: fp16/bf16으로 나눈 위 절반과 아래 절반
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
