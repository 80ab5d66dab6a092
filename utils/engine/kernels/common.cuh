// 학습 커널이 함께 쓰는 것: 16바이트(16비트 값 8개)씩 읽고 쓰기, 블록의 합, dropout의 난수.
// 앞에 device.cuh가 와야 한다. 상수는 모두 train_kernels.py가 -D로 넣는다.

// 한 thread가 다루는 값 8개. 메모리에는 16비트로 있고 계산은 fp32로 한다.
struct Eight { float v[8]; };
struct alignas(16) Four { float v[4]; };  // fp32 네 개를 한 번에 읽는다

// 16비트로 줄인다. device.cuh의 narrow와 달리 fp16의 범위를 넘으면 inf가 된다: gradient가 넘친 것을 GradScaler가 알아야 한다.
__device__ __forceinline__ u16 to_bits(float value) {
#if !BF16 && defined(__CUDA_ARCH__)
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return narrow<BF16>(value);
#endif
}

__device__ __forceinline__ Eight load(const u16* at) {
    uint4 raw = *(const uint4*)at;
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.v[2 * i] = widen<BF16>((u16)(words[i] & 0xffff));
        out.v[2 * i + 1] = widen<BF16>((u16)(words[i] >> 16));
    }
    return out;
}

// 이웃한 두 값을 한 워드로. 명령 하나로 둘을 함께 줄인다.
__device__ __forceinline__ u32 pack_two(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 both;
    if (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return (u32)to_bits(low) | ((u32)to_bits(high) << 16);
#endif
}

__device__ __forceinline__ void store(u16* at, const Eight& value) {
    uint4 raw;
    raw.x = pack_two(value.v[0], value.v[1]), raw.y = pack_two(value.v[2], value.v[3]);
    raw.z = pack_two(value.v[4], value.v[5]), raw.w = pack_two(value.v[6], value.v[7]);
    *(uint4*)at = raw;
}

__device__ __forceinline__ void unpack_four(uint2 raw, float (&value)[4]) {
    value[0] = widen<BF16>((u16)(raw.x & 0xffff)), value[1] = widen<BF16>((u16)(raw.x >> 16));
    value[2] = widen<BF16>((u16)(raw.y & 0xffff)), value[3] = widen<BF16>((u16)(raw.y >> 16));
}

// fp32 여덟 개를 읽는다. 없으면(null) `otherwise`다.
__device__ __forceinline__ Eight load_float(const float* at, float otherwise) {
    Eight out;
    Four low = {}, high = {};
    if (at) low = ((const Four*)at)[0], high = ((const Four*)at)[1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.v[i] = at ? low.v[i] : otherwise;
        out.v[i + 4] = at ? high.v[i] : otherwise;
    }
    return out;
}

__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// 블록 전체의 합 N개. 모든 thread가 합을 받는다. THREADS는 블록의 thread 수.
template <int N, int THREADS> __device__ __forceinline__ void sum_block(float (&values)[N]) {
    __shared__ float parts[N][32];
#pragma unroll
    for (int n = 0; n < N; n++) values[n] = sum_lanes(values[n]);
    if (threadIdx.x % 32 == 0)
        for (int n = 0; n < N; n++) parts[n][threadIdx.x / 32] = values[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        float total = 0.f;
        for (int warp = 0; warp < THREADS / 32; warp++) total += parts[n][warp];
        values[n] = total;
    }
    __syncthreads();  // 다음 호출이 parts를 덮기 전에 모두 읽는다
}

// murmur3의 마무리 섞기. 입력의 한 비트가 출력의 모든 비트에 퍼진다.
__device__ __forceinline__ u32 mix(u32 h) {
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ (h >> 16);
}

// LoRA 하나의 입력에 거는 dropout. 난수는 (블록의 시드, 선형층의 번호 site, 블록 안의 자리)로만 정해지므로 저장하지
// 않아도 backward와 재계산이 같은 값을 버린다. 파이썬의 `drop_scale`과 비트까지 같다.
struct Dropout {
    const int* keys;   // [rows, 2] 블록마다의 시드. null이면 버리지 않는다
    int block_len;     // 블록의 토큰 수
    int site;
    int threshold;     // 16비트 난수가 이보다 작으면 버린다
    float keep_scale;  // 남는 값에 곱하는 수
};

// 한 행의 시드 둘.
__device__ __forceinline__ uint2 drop_seed(const Dropout& drop, int row) {
    if (drop.keys == nullptr || drop.threshold == 0) return uint2{0, 0};
    const int* key = drop.keys + 2 * (row / drop.block_len);
    return uint2{mix((u32)key[0] ^ ((u32)drop.site * 0x9e3779b9u + 1u)), (u32)key[1]};
}

// 이웃한 두 값의 16비트 난수를 담은 워드. pair는 블록 안에서 몇째 쌍인지다.
__device__ __forceinline__ u32 drop_word(uint2 seed, u32 pair) {
    u32 word = (mix(pair + seed.x) ^ seed.y) * 0x9e3779b1u;
    return word ^ word >> 16;
}

// 행 row의 column부터 여덟 값(워드 넷)에서 버릴 것을 0으로 만들고, 남긴 자리의 비트를 돌려준다. 남는 값의 배율은 나중에
// 곱한다.
__device__ __forceinline__ u32 drop_eight(const Dropout& drop, uint2 seed, int row, int columns, int column,
                                          u32 (&words)[4]) {
    if (drop.keys == nullptr || drop.threshold == 0) return 255;
    u32 pair = (u32)(row % drop.block_len) * (u32)(columns / 2) + (u32)(column / 2), kept = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 word = drop_word(seed, pair + i);
        bool low = (int)(word & 0xffff) >= drop.threshold, high = (int)(word >> 16) >= drop.threshold;
        words[i] &= (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
        kept |= (low | high << 1) << 2 * i;
    }
    return kept;
}

// tanh. exp 하나로 구한다. exp가 넘치면 나누기가 0이 되어 1에 머문다.
__device__ __forceinline__ float bounded_tanh(float x) { return 1.f - 2.f / (1.f + expf(2.f * x)); }
