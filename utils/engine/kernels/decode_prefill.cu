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

// 토큰마다 두 layer norm을 함께 센다. x: [T][HIDDEN] fp32.
extern "C" __global__ void __launch_bounds__(THREADS) both_norms(const float* x, float eps, const float* norm1,
                                                                 const float* shift1, const float* norm2,
                                                                 const float* shift2, u16* out1, u16* out2) {
    __shared__ float scratch[32];
    x += (size_t)blockIdx.x * HIDDEN, out1 += (size_t)blockIdx.x * HIDDEN, out2 += (size_t)blockIdx.x * HIDDEN;
    float value[PER_THREAD], sum = 0.f, square = 0.f;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        value[j] = i < HIDDEN ? x[i] : 0.f;
        sum += value[j];
    }
    float mean = block_sum(sum, scratch) / HIDDEN;
    for (int j = 0; j < PER_THREAD; j++)
        if (threadIdx.x + j * THREADS < HIDDEN) square += (value[j] - mean) * (value[j] - mean);
    float scale = rsqrtf(block_sum(square, scratch) / HIDDEN + eps);
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= HIDDEN) continue;
        float normal = (value[j] - mean) * scale;
        out1[i] = narrow<BF16>(normal * norm1[i] + shift1[i]);
        out2[i] = narrow<BF16>(normal * norm2[i] + shift2[i]);
    }
}

// qkv [T][3 HIDDEN]를 머리별로 나누어 돌리고(rotary) cache에도 적는다. grid (T, HEADS), keys와 values: [HEADS][CONTEXT].
extern "C" __global__ void split_heads(const u16* qkv, const float2* turns, const int* past, int tokens, u16* query,
                                       u16* keys, u16* values, signed char* key_cache, u16* key_scales,
                                       signed char* value_cache, u16* value_scales) {
    __shared__ float source[3 * HEAD_DIM];
    int token = blockIdx.x, head = blockIdx.y, position = *past + token;
    if (position >= CONTEXT) return;  // 조각의 길이를 맞추느라 채운 자리
    for (int i = threadIdx.x; i < 3 * HEAD_DIM; i += blockDim.x)
        source[i] = widen<BF16>(qkv[((size_t)token * HEADS + head) * 3 * HEAD_DIM + i]);
    __syncthreads();
    const float2* now = turns + (size_t)position * (ROTARY / 2);
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        float key = rotate(source + HEAD_DIM, now, d), value = source[2 * HEAD_DIM + d];
        size_t at = ((size_t)head * CONTEXT + position) * HEAD_DIM + d;
        query[((size_t)head * tokens + token) * HEAD_DIM + d] = narrow<BF16>(rotate(source, now, d));
        keys[at] = narrow<BF16>(key);
        values[at] = narrow<BF16>(value);
        store_int8(key_cache, key_scales, at, key);
        store_int8(value_cache, value_scales, at, value);
    }
}

// 앞 조각들의 K, V를 cache에서 푼다. 아직 오지 않은 위치는 0으로 둔다. grid (CONTEXT, HEADS).
extern "C" __global__ void read_cache(const signed char* key_cache, const u16* key_scales, const signed char* value_cache,
                                      const u16* value_scales, const int* past, u16* keys, u16* values) {
    bool filled = blockIdx.x < *past;
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        size_t at = ((size_t)blockIdx.y * CONTEXT + blockIdx.x) * HEAD_DIM + d;
        keys[at] = filled ? narrow<BF16>(key_cache[at] * widen<false>(key_scales[at / GROUP])) : 0;
        values[at] = filled ? narrow<BF16>(value_cache[at] * widen<false>(value_scales[at / GROUP])) : 0;
    }
}
