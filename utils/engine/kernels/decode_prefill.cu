// 질문을 읽을 때 쓰는 커널들. 행렬 곱과 attention은 torch가 하고 여기서는 그 사이를 잇는다.

// NF4 행렬의 행 몇 개를 16비트로 푼다. 스레드 하나가 8칸을 맡는다. count: 8칸짜리 조각의 수.
extern "C" __global__ void dequantize(const u8* weight, const void* scale, const float* group, float offset,
                                      const float* code, u16* out, int first_row, int columns, int count) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = NF4_CODE[threadIdx.x];
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    size_t at = (size_t)first_row * columns + (size_t)i * 8;
// 바이트 하나에 가중치가 둘이고 위의 네 비트가 앞의 칸이다
    u32 packed = __ldg((const u32*)(weight + at / 2)), pairs[4];
#if DOUBLE_QUANT
    float largest = __ldg(code + ((const u8*)scale)[at / 64]) * __ldg(group + (at >> 14)) + offset;
#else
    float largest = ((const float*)scale)[at / 64];
#endif
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 byte = packed >> j * 8 & 255;
        pairs[j] = narrow<BF16>(table[byte >> 4] * largest) | (u32)narrow<BF16>(table[byte & 15] * largest) << 16;
    }
    ((uint4*)out)[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// int8 행렬의 행 몇 개를 16비트로 푼다. 스레드 하나가 8칸을 맡는다.
extern "C" __global__ void widen_int8(const signed char* weight, const float* row_scale, u16* out, int first_row,
                                      int columns, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    size_t at = (size_t)first_row * columns + (size_t)i * 8;
    float scale = row_scale[at / columns];
    for (int j = 0; j < 8; j++) out[(size_t)i * 8 + j] = narrow<BF16>(weight[at + j] * scale);
}

// 토큰마다의 norm. grid (T). in: fp32 [T][HIDDEN]. bias가 널이면 RMS norm이거나 bias가 없는 것이다.
//   residual이 널이면 out [T][HIDDEN] 16비트에 적고, 아니면 residual [T][HIDDEN] fp32에 더한다(POST_NORM).
extern "C" __global__ void __launch_bounds__(THREADS) normalize(const float* in, const float* weight, const float* bias,
                                                                u16* out, float* residual) {
    __shared__ float scratch[32];
    size_t at = (size_t)blockIdx.x * HIDDEN;
    float value[PER_THREAD], sum = 0.f, square = 0.f;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        value[j] = i < HIDDEN ? in[at + i] : 0.f;
        sum += value[j];
    }
// 평균을 먼저 빼고 제곱을 모은다. 질문을 읽을 때는 시간이 넉넉하므로 두 번 동기화해도 된다
    float mean = RMS ? 0.f : block_sum(sum, scratch) / HIDDEN;
    for (int j = 0; j < PER_THREAD; j++)
        if (threadIdx.x + j * THREADS < HIDDEN) square += (value[j] - mean) * (value[j] - mean);
    float scale = rsqrtf(block_sum(square, scratch) / HIDDEN + EPS);
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= HIDDEN) continue;
        float normal = (value[j] - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
        if (residual) residual[at + i] += normal;
        else out[at + i] = narrow<BF16>(normal);
    }
}

// qkv를 머리별로 나누어 norm하고 돌리고 cache에도 적는다. grid (T, HEADS + KV_HEADS), 블록 SPLIT_THREADS.
//   qkv: 16비트 [T][QDIM + 2 KVDIM], query: [HEADS][T][HEAD_DIM], keys, values: [KV_HEADS][total][HEAD_DIM]
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS) split_heads(
    const u16* qkv, Attention attention, u8* const* pages, const int* past, int tokens, int total, u16* query,
    u16* keys, u16* values) {
    __shared__ float raw[2][HEAD_DIM], scratch[32];
    int token = blockIdx.x, position = *past + token, tid = threadIdx.x;
// 앞의 HEADS개 블록은 q 머리를, 나머지는 k와 v 머리를 맡는다
    bool is_query = blockIdx.y < HEADS;
    int head = is_query ? blockIdx.y : blockIdx.y - HEADS;
    if (position >= CONTEXT) return;  // 조각의 길이를 맞추느라 채운 자리
    const u16* source = qkv + (size_t)token * (QDIM + 2 * KVDIM);
    const float* weight = is_query ? attention.q_norm : attention.k_norm;
    float square = 0.f;
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) {
        raw[0][d] = widen<BF16>(source[(is_query ? query_at(head) : key_at(head)) + d]);
        raw[1][d] = widen<BF16>(source[(is_query ? query_at(head) : value_at(head)) + d]);
        square += raw[0][d] * raw[0][d];
    }
// 머리마다의 norm. v에는 걸지 않는다
    float scale = weight ? rsqrtf(block_sum(square, scratch) / HEAD_DIM + EPS) : 1.f;
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) raw[0][d] *= scale * (weight ? weight[d] : 1.f);
    __syncthreads();
    Page page(pages, position);
    const float2* turns = attention.turn < 0 ? 0 : page.turns(attention.turn);
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) {
        float turned = rotate(raw[0], turn_of(turns, d), d);
        if (is_query) {
            query[((size_t)head * tokens + token) * HEAD_DIM + d] = narrow<BF16>(turned);
            continue;
        }
// 이 조각의 attention은 16비트 K, V로 세고, 뒤의 토큰이 읽을 것은 int8로 적는다
        size_t at = ((size_t)head * total + position) * HEAD_DIM + d;
        keys[at] = narrow<BF16>(turned);
        values[at] = narrow<BF16>(raw[1][d]);
        store_int8(page.values(0, attention.layer, head), page.scales(0, attention.layer, head), d, turned);
        store_int8(page.values(1, attention.layer, head), page.scales(1, attention.layer, head), d, raw[1][d]);
    }
}

// 앞 조각들의 K, V를 cache에서 푼다. grid (앞 조각들의 길이, KV_HEADS). keys, values: [KV_HEADS][total][HEAD_DIM].
extern "C" __global__ void read_cache(u8* const* pages, int layer, int total, u16* keys, u16* values) {
    Page page(pages, blockIdx.x);
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        size_t at = ((size_t)blockIdx.y * total + blockIdx.x) * HEAD_DIM + d;
        keys[at] = narrow<BF16>(page.values(0, layer, blockIdx.y)[d] *
                                widen<false>(page.scales(0, layer, blockIdx.y)[d / GROUP]));
        values[at] = narrow<BF16>(page.values(1, layer, blockIdx.y)[d] *
                                  widen<false>(page.scales(1, layer, blockIdx.y)[d / GROUP]));
    }
}
