// 토큰 하나를 만드는 커널들이 함께 쓰는 것: 16비트 변환, 블록 합, 행렬-벡터 곱.
// 컴파일할 때 정하는 상수: HIDDEN FF HEADS HEAD_DIM ROTARY CONTEXT VOCAB RANK NF4 DOUBLE_QUANT BF16

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define WARPS 16
#define THREADS (WARPS * 32)
#define DEPTH 4
#define ROWS 16          // 행렬의 행을 이만큼씩 묶어 텐서 코어 하나의 높이로 쓴다
#define WIDE_K 64        // 16비트 가중치는 한 번에 64칸, NF4는 128칸(절댓값 블록 둘)을 읽는다
#define NF4_K 128
#define ACT_BF16 (BF16 && !NF4)  // NF4는 코드표도 활성값도 fp16이다. bf16보다 정밀하다

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <bool BF> __device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
#if __CUDA_ARCH__ >= 800
    if (BF) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
#endif
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(fminf(fmaxf(value, -65504.f), 65504.f)));
    return bits;
}

template <bool BF> __device__ __forceinline__ float widen(u16 bits) {
    if (BF) return __uint_as_float((u32)bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// 활성값 하나를 16비트 둘(위, 아래)로 나누어 적는다. 둘을 더하면 fp32에 가깝다.
template <bool BF> __device__ __forceinline__ void store_split(u16* high, u16* low, float value) {
    u16 top = narrow<BF>(value);
    *high = top;
    *low = narrow<BF>(value - widen<BF>(top));
}

template <bool BF> __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    if (BF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

__device__ __forceinline__ uint4 load_weight(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// 블록 전체의 합. scratch는 float 32개.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    value = (threadIdx.x & 31) < (blockDim.x >> 5) ? scratch[threadIdx.x & 31] : 0.f;
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__constant__ float NF4_CODE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// NF4 바이트 하나(가중치 둘)를 fp16 둘로 바꾸는 표. 레인마다 사본을 두어 은행 충돌이 없다. 32 KB.
__device__ __forceinline__ void build_table(u32* table) {
    for (int i = threadIdx.x; i < 256 * 32; i += THREADS)
        table[i] = narrow<false>(NF4_CODE[i >> 9]) | (u32)narrow<false>(NF4_CODE[i >> 5 & 15]) << 16;
}

// 행렬 하나. 16비트 가중치면 weight만 쓴다. scale: 64칸마다의 절댓값(이중 양자화면 8비트), group: 그 절댓값의 절댓값.
struct Matrix {
    const u8* weight;
    const void* scale;
    const float* group;
    float offset;
};

// 활성값 [칸]의 위, 아래 절반. 텐서 코어의 열 여덟 가운데 몇만 쓴다.
struct Activation {
    const u16* high;
    const u16* low;
};

template <bool BF> struct WideItem {
    enum { STEP = WIDE_K };
    uint4 top[2], low[2];

    __device__ __forceinline__ void load(const Matrix& m, int columns, int row, int last_row, int segment) {
        int lane = threadIdx.x & 31, group = lane >> 2, k = segment * STEP + (lane & 3) * 8;
        const u16* weight = (const u16*)m.weight;
        const u16* upper = weight + (size_t)min(row + group, last_row) * columns + k;
        const u16* lower = weight + (size_t)min(row + group + 8, last_row) * columns + k;
        for (int u = 0; u < 2; u++) top[u] = load_weight(upper + u * 32), low[u] = load_weight(lower + u * 32);
    }

    // 열 0은 위 절반, 열 1은 아래 절반이다.
    template <bool CACHED>
    __device__ __forceinline__ void add(const Matrix&, const Activation& act, int segment, const u32*, const float*,
                                        float& upper, float& lower) {
        int lane = threadIdx.x & 31, column = lane >> 2;
        const u16* source = (column ? act.low : act.high) + segment * STEP + (lane & 3) * 8;
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        for (int u = 0; u < 2; u++) {
            uint4 b = {0, 0, 0, 0};
            if (column < 2) b = CACHED ? __ldcg((const uint4*)(source + u * 32)) : *(const uint4*)(source + u * 32);
            mma<BF>(c, top[u].x, low[u].x, top[u].y, low[u].y, b.x, b.y);
            mma<BF>(c, top[u].z, low[u].z, top[u].w, low[u].w, b.z, b.w);
        }
        upper += c[0] + c[1];
        lower += c[2] + c[3];
    }
};

struct Nf4Item {
    enum { STEP = NF4_K };
    uint4 top, low;
    float2 top_scale, low_scale;  // 이중 양자화면 x에 8비트 절댓값 둘, y에 그 묶음의 절댓값

    __device__ __forceinline__ void load(const Matrix& m, int columns, int row, int, int segment) {
        int lane = threadIdx.x & 31;
        size_t upper = (size_t)(row + (lane >> 2)) * columns + segment * STEP, lower = upper + 8 * (size_t)columns;
        top = load_weight(m.weight + (upper + (lane & 3) * 32) / 2);
        low = load_weight(m.weight + (lower + (lane & 3) * 32) / 2);
#if DOUBLE_QUANT
        top_scale = {__uint_as_float(__ldg((const u16*)m.scale + upper / 128)), __ldg(m.group + (upper >> 14))};
        low_scale = {__uint_as_float(__ldg((const u16*)m.scale + lower / 128)), __ldg(m.group + (lower >> 14))};
#else
        top_scale = __ldg((const float2*)m.scale + upper / 128);
        low_scale = __ldg((const float2*)m.scale + lower / 128);
#endif
    }

    __device__ __forceinline__ static float2 decode(float2 scale, const float* code, float offset) {
#if DOUBLE_QUANT
        u32 pair = __float_as_uint(scale.x);
        return {code[pair & 255] * scale.y + offset, code[pair >> 8] * scale.y + offset};
#else
        return scale;
#endif
    }

    // 한 레인의 32칸은 절댓값 블록 하나에 든다. 블록마다 열을 달리하면(열 0, 1은 위 절반, 2, 3은 아래 절반) 블록별
    // 합이 따로 나오므로 절댓값은 합에 한 번만 곱한다.
    template <bool CACHED>
    __device__ __forceinline__ void add(const Matrix& m, const Activation& act, int segment, const u32* table,
                                        const float* code, float& upper, float& lower) {
        int lane = threadIdx.x & 31, column = lane >> 2, quarter = lane & 3, lane_bits = lane * 4;
        bool mine = column < 4 && (column & 1) == quarter >> 1;
        const u16* source = (column & 2 ? act.low : act.high) + segment * STEP + quarter * 32;
        u32 upper_words[4] = {top.x, top.y, top.z, top.w}, lower_words[4] = {low.x, low.y, low.z, low.w};
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        #define PAIR(moved) (*(const u32*)((const char*)table + ((moved) & 0x7f80 | lane_bits)))
        for (int q = 0; q < 4; q++) {
            uint4 b = {0, 0, 0, 0};
            if (mine) b = CACHED ? __ldcg((const uint4*)(source + q * 8)) : *(const uint4*)(source + q * 8);
            u32 a = upper_words[q], d = lower_words[q];
            mma<false>(c, PAIR(a << 7), PAIR(d << 7), PAIR(a >> 1), PAIR(d >> 1), b.x, b.y);
            mma<false>(c, PAIR(a >> 9), PAIR(d >> 9), PAIR(a >> 17), PAIR(d >> 17), b.z, b.w);
        }
        #undef PAIR
        float2 s = decode(top_scale, code, m.offset), z = decode(low_scale, code, m.offset);
        upper += c[0] * s.x + c[1] * s.y;
        lower += c[2] * z.x + c[3] * z.y;
    }
};

#if NF4
typedef Nf4Item Item;
#else
typedef WideItem<BF16> Item;
#endif

// 블록이 맡은 행 묶음들과 행렬의 칸을 워프들이 나누어 곱한다. 행렬 하나(K2 = 0) 또는 둘을 잇는다.
// partial[묶음][워프][16]에 워프마다의 합을 더한다. 블록의 동기화가 없어 읽기가 끊기지 않는다.
template <class T, int K, int K2, int AHEAD> struct Product {
    enum { FIRST = K / T::STEP, SECOND = K2 / T::STEP };
    T items[AHEAD];
    Matrix a, b;
    int tile, split, count, last_row;

    __device__ __forceinline__ Product(Matrix a, Matrix b, int tile, int tiles, int rows)
        : a(a), b(b), tile(tile), split(tiles * FIRST), count(tiles * (FIRST + SECOND)), last_row(rows - 1) {}

    __device__ __forceinline__ void load(T& item, int i) {
        if (K2 == 0 || i < split) item.load(a, K, (tile + i / FIRST) * ROWS, last_row, i % FIRST);
        else item.load(b, K2, (tile + (i - split) / max(SECOND, 1)) * ROWS, last_row, (i - split) % max(SECOND, 1));
    }

    __device__ __forceinline__ void prime() {
        #pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            int i = (threadIdx.x >> 5) + d * WARPS;
            if (i < count) load(items[d], i);
        }
    }

    __device__ __forceinline__ void flush(float* partial, int slot, float upper, float lower) {
        for (int step = 1; step < 4; step <<= 1) {
            upper += __shfl_xor_sync(~0u, upper, step);
            lower += __shfl_xor_sync(~0u, lower, step);
        }
        float* out = partial + (slot * WARPS + (threadIdx.x >> 5)) * ROWS + (threadIdx.x >> 2 & 7);
        if ((threadIdx.x & 3) == 0) out[0] += upper, out[8] += lower;
    }

    // CACHED면 활성값을 L2에서 읽는다. 두 번째 행렬의 활성값은 앞의 커널이 끝나야 있다.
    template <bool CACHED>
    __device__ __forceinline__ void run(Activation act, Activation act2, const u32* table, const float* code,
                                        float* partial) {
        int slot = -1;
        bool waited = false;
        float upper = 0.f, lower = 0.f;
        for (int base = threadIdx.x >> 5; base < count; base += AHEAD * WARPS) {
            #pragma unroll
            for (int d = 0; d < AHEAD; d++) {
                int i = base + d * WARPS;
                if (i >= count) break;
                bool first = K2 == 0 || i < split;
                if (!first && !waited) wait_for_previous_kernel(), waited = true;
                int now = first ? i / FIRST : (i - split) / max(SECOND, 1);
                if (now != slot) {
                    if (slot >= 0) flush(partial, slot, upper, lower);
                    slot = now, upper = lower = 0.f;
                }
                if (first) items[d].template add<CACHED>(a, act, i % FIRST, table, code, upper, lower);
                else items[d].template add<CACHED>(b, act2, (i - split) % max(SECOND, 1), table, code, upper, lower);
                if (i + AHEAD * WARPS < count) load(items[d], i + AHEAD * WARPS);
            }
        }
        if (slot >= 0) flush(partial, slot, upper, lower);
    }
};

__device__ __forceinline__ float row_sum(const float* partial, int row) {
    float sum = 0.f;
    for (int warp = 0; warp < WARPS; warp++) sum += partial[((row / ROWS) * WARPS + warp) * ROWS + row % ROWS];
    return sum;
}
