// 질문 LINES개에 함께 답하는 커널. 가중치를 한 번 읽어 모든 줄에 곱한다. 텐서 코어의 열 여덟이 줄 여덟이다.
// 한 줄씩 답하는 커널(decode.cu)과 차례도 활성값을 위와 아래 절반으로 나누는 것도 같아서, 로짓의 차이는 더하는 차례뿐이다.
//   x, y: 잔차와 아직 더하지 않은 출력 fp32 [LINES][HIDDEN]
//   attended: 16비트 [LINES][위, 아래][QDIM]. act: 16비트 [위, 아래][LINES][FF]. IN_SCALE을 곱해 두었고, 칸의 자리는
//       `line_place`로 섞여 있다
//
// 워프가 칸을 나눈다: 워프 w는 조각 w, w + WARPS, ...를 맡아 제 칸의 활성값을 레지스터에 쥐고, 블록이 맡은 묶음(행 16개)을
// 차례로 지나며 가중치만 읽는다. 워프마다의 합은 공유 메모리에서 더한다.

#define SETS (LINES / 8)  // 텐서 코어의 열이 여덟이라 줄을 여덟씩 나눈다
#define CELLS (ROWS * LINES)
#define LINE_STAGE (8 * 64 * 2)  // 입력을 옮길 때 워프 하나가 쓰는 자리(바이트)
#define LINE_TILES(units) ((int)((u64)(units) * blockIdx.x / gridDim.x))

static_assert(LINES == 16, "cell의 섞는 법이 줄 16개에 맞춘 것이다");

// 묶음 하나의 합 [ROWS][LINES]에서 (행, 줄)의 자리. 줄의 번호를 행에 따라 섞어 은행 충돌 없이 줄로도 행으로도 읽는다.
__device__ __forceinline__ int cell(int row, int line) {
    int r = row >> 1;
    return row * LINES + (line ^ ((r & 1) << 3 | (r & 6)));
}

// 레인들이 쥔 값 열여섯을 값마다 FIRST * 2개 레인(16이나 32)에서 더한다. 합은 레인의 번호를 FIRST / 8로 나눈 나머지 열여섯
// 번째 것을 그 레인이 얻는다. 값마다 따로 더하면 섞기(shuffle)가 다섯 배 든다.
template <int FIRST> __device__ __forceinline__ float gather(float (&a)[16]) {
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const int step = FIRST >> k, half = 8 >> k;
        bool upper = threadIdx.x & step;
        #pragma unroll
        for (int m = 0; m < 8; m++)
            if (m < half) a[m] = (upper ? a[m + half] : a[m]) + __shfl_xor_sync(~0u, upper ? a[m] : a[m + half], step);
    }
    return FIRST == 16 ? a[0] + __shfl_xor_sync(~0u, a[0], 1) : a[0];
}

// 단위는 칸 64개다. 레인 4g + t는 줄 g와 g + 8의 16칸을 8칸짜리 둘로 쥔다. column_of는 h번째 8칸이 시작하는 칸이다.
// 16비트 가중치는 이웃한 레인 넷이 이어진 64바이트를 읽도록 8칸씩 번갈아 놓는다(SPREAD).
template <bool SPREAD> __device__ __forceinline__ int column_of(int h) {
    int t = threadIdx.x & 3;
    return SPREAD ? h * 32 + t * 8 : t * 16 + h * 8;
}

// 단위 하나의 활성값: 16비트 16칸을 두 칸씩. HALVES가 2면 위와 아래 절반이다.
template <int HALVES> struct Unit { u32 v[SETS][HALVES][8]; };

// 가중치 행 16개 x 칸 32개(레인마다 8칸, w의 넷이 mma 하나의 것)를 모든 줄에 곱한다. 같은 합에 이어 더하는 mma를 떼어 놓는다:
// 앞의 것이 끝나야 시작하므로 붙여 놓으면 텐서 코어가 쉰다.
template <bool BF, int HALVES>
__device__ __forceinline__ void multiply(float (&sum)[SETS][4], const u32 (&w)[8], const Unit<HALVES>& b, int h) {
    #pragma unroll
    for (int j = 0; j < 2 * HALVES * SETS; j++) {
        int k = j / SETS / HALVES, half = j / SETS % HALVES, s = j % SETS;
        const u32* in = b.v[s][half] + h * 4 + k * 2;
        mma<BF>(sum[s], w[k * 4], w[k * 4 + 1], w[k * 4 + 2], w[k * 4 + 3], in[0], in[1]);
    }
}

// 가중치의 조각(행 16개 x 칸 64 * UNITS개). 레인은 행 g와 g + 8의 칸을 맡는다. add는 곱하면서, 다 쓴 자리에 다음 조각을 읽기
// 시작한다: 레지스터를 더 쓰지 않고 메모리를 기다리는 시간이 곱하는 시간에 숨는다.
// sum[s]의 넷: (행 g, 줄 8s + 2t), (g, 8s + 2t + 1), (g + 8, 8s + 2t), (g + 8, 8s + 2t + 1).
template <bool BF, int K, bool HALF, int U, bool SPREAD_> struct WideLines {
    enum { UNITS = U, SPREAD = SPREAD_, ROW_BYTES = K * 2, STEP_BYTES = UNITS * 128, HEIGHT = HALF ? 8 : ROWS,
           SCALED = 0 };
    uint4 top[UNITS][2], low[HALF ? 1 : UNITS][2];

    // i번째 8칸. 8행 아래의 행은 8 * ROW_BYTES 뒤에 있다.
    __device__ __forceinline__ void load(const Matrix& m, u32 at, int i) {
        const u8* source = m.weight + at + (i / 2 * 64 + column_of<SPREAD>(i % 2)) * 2;
        top[i / 2][i % 2] = load_weight(source);
        if (!HALF) low[HALF ? 0 : i / 2][i % 2] = load_weight(source + 8 * ROW_BYTES);
    }
    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        #pragma unroll
        for (int i = 0; i < UNITS * 2; i++) load(m, at, i);
    }
    template <int HALVES> __device__ __forceinline__ void add(const Unit<HALVES> (&b)[UNITS], const float*,
                                                              float (&sum)[SETS][4], const Matrix& next, u32 next_at) {
        #pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
            uint4 a = top[i / 2][i % 2], d = {0, 0, 0, 0};
            if (!HALF) d = low[HALF ? 0 : i / 2][i % 2];
            u32 w[8] = {a.x, d.x, a.y, d.y, a.z, d.z, a.w, d.w};
            multiply<BF>(sum, w, b[i / 2], i % 2);
            load(next, next_at, i);
        }
    }
};

// NF4: 단위가 절댓값 블록 하나라서, 단위의 합에 절댓값을 한 번만 곱한다.
template <int K, int WIDTH> struct Nf4Lines {
    enum { UNITS = WIDTH % (128 * WARPS) ? 1 : 2, SPREAD = 0, ROW_BYTES = K / 2, STEP_BYTES = UNITS * 32, HEIGHT = ROWS,
           SCALED = DOUBLE_QUANT ? 1 : 4 };  // SCALED: 절댓값 하나의 바이트
    uint2 top[UNITS], low[UNITS];
    u32 top_scale[2], low_scale[2];  // 이중 양자화면 8비트 절댓값들과 그 묶음의 절댓값, 아니면 단위마다의 절댓값
    float offset;

    __device__ __forceinline__ static void load_scale(const Matrix& m, u32 at, u32 (&scale)[2]) {
        // at은 바이트(가중치 둘)다. 절댓값 하나가 64칸(32바이트)을, 그 묶음 하나가 절댓값 256개(8,192바이트)를 맡는다
#if DOUBLE_QUANT
        const u8* codes = (const u8*)m.scale + (at >> 5);
        scale[0] = UNITS == 2 ? __ldg((const u16*)codes) : __ldg(codes);
        scale[1] = __float_as_uint(__ldg(m.group + (at >> 13)));
#else
        #pragma unroll
        for (int u = 0; u < UNITS; u++) scale[u] = __float_as_uint(__ldg((const float*)m.scale + (at >> 5) + u));
#endif
    }
    // 단위 u의 가중치.
    __device__ __forceinline__ void load(const Matrix& m, u32 at, int u) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 8 + u * 32;
        top[u] = load_weight8(source);
        low[u] = load_weight8(source + 8 * ROW_BYTES);
    }
    __device__ __forceinline__ void load_scales(const Matrix& m, u32 at) {
        offset = m.offset;
        load_scale(m, at, top_scale);
        load_scale(m, at + 8 * ROW_BYTES, low_scale);
    }
    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        #pragma unroll
        for (int u = 0; u < UNITS; u++) load(m, at, u);
        load_scales(m, at);
    }
    __device__ __forceinline__ float decode(const u32 (&scale)[2], int u, const float* code) const {
        // 이중 양자화의 절댓값 = 표[8비트] x 묶음의 절댓값 + 평균(offset)
#if DOUBLE_QUANT
        return code[scale[0] >> u * 8 & 255] * __uint_as_float(scale[1]) + offset;
#else
        return __uint_as_float(scale[u]);
#endif
    }
    template <int HALVES> __device__ __forceinline__ void add(const Unit<HALVES> (&b)[UNITS], const float* code,
                                                              float (&sum)[SETS][4], const Matrix& next, u32 next_at) {
        u32 lane = (threadIdx.x & 31) * 4;
        #pragma unroll
        for (int u = 0; u < UNITS; u++) {
            // 절댓값을 곱하기 전의 합. 절댓값은 행마다 다르므로 위 행(above)과 아래 행(below)에 따로 곱한다
            float c[SETS][4] = {};
            u32 w[2][8];
            #pragma unroll
            for (int h = 0; h < 2; h++) {
// 표에서 꺼낸 가중치는 모든 줄이 함께 쓴다. 한 줄일 때와 달리 꺼내는 값이 거의 들지 않는다
                u32 a = h ? top[u].y : top[u].x, d = h ? low[u].y : low[u].x;
                w[h][0] = pair_at<0>(a, lane), w[h][1] = pair_at<0>(d, lane), w[h][2] = pair_at<1>(a, lane);
                w[h][3] = pair_at<1>(d, lane), w[h][4] = pair_at<2>(a, lane), w[h][5] = pair_at<2>(d, lane);
                w[h][6] = pair_at<3>(a, lane), w[h][7] = pair_at<3>(d, lane);
            }
            load(next, next_at, u);
            #pragma unroll
            for (int h = 0; h < 2; h++) multiply<false>(c, w[h], b[u], h);
            float above = decode(top_scale, u, code), below = decode(low_scale, u, code);
            #pragma unroll
            for (int s = 0; s < SETS; s++) {
                sum[s][0] += c[s][0] * above, sum[s][1] += c[s][1] * above;
                sum[s][2] += c[s][2] * below, sum[s][3] += c[s][3] * below;
            }
        }
        load_scales(next, next_at);
    }
};

// int8: 행마다의 배율은 다 더한 뒤에 곱한다.
template <int K> struct Int8Lines {
    enum { UNITS = 1, SPREAD = 0, ROW_BYTES = K, STEP_BYTES = 64, HEIGHT = ROWS, SCALED = 0 };
    uint4 top, low;

    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 16;
        top = load_weight(source);
        low = load_weight(source + 8 * ROW_BYTES);
    }
    template <int HALVES> __device__ __forceinline__ void add(const Unit<HALVES> (&b)[UNITS], const float*,
                                                              float (&sum)[SETS][4], const Matrix& next, u32 next_at) {
        u32 a[4] = {top.x, top.y, top.z, top.w}, d[4] = {low.x, low.y, low.z, low.w}, w[2][8];
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            // int8 넷을 fp16 넷으로 푼다. -128부터 127까지는 fp16에 어긋남 없이 들어간다
            uint2 above = int8_to_fp16(a[q]), below = int8_to_fp16(d[q]);
            u32* to = w[q / 2] + q % 2 * 4;
            to[0] = above.x, to[1] = below.x, to[2] = above.y, to[3] = below.y;
        }
        load(next, next_at);
        #pragma unroll
        for (int h = 0; h < 2; h++) multiply<false>(sum, w[h], b[0], h);
    }
};

#if WEIGHT == NF4_WEIGHT
template <int K, int WIDTH = K> using LinePiece = Nf4Lines<K, WIDTH>;
#elif WEIGHT == INT8_WEIGHT
template <int K, int WIDTH = K> using LinePiece = Int8Lines<K>;
#else
template <int K, int WIDTH = K> using LinePiece = WideLines<BF16, K, false, 1, true>;
#endif

// 칸 K개를 워프들이 나누는 법. 워프는 조각 PER개(마지막은 없을 수 있다)를 CHUNKS번에 AT_ONCE개씩 쥔다.
//   MOST: 활성값을 쥐는 데 쓰는 레지스터의 수.
//   ALL_HELD: 제 칸의 활성값을 모두 쥐고 있을 수 있는지. 아니면 CHUNKS번 나누어 쥐고 합을 공유 메모리에 더해 간다.
//   SEGMENTS: 조각의 수. ACROSS: 조각을 하나라도 맡는 워프의 수. REGISTERS: 조각 하나의 활성값이 드는 레지스터의 수.
template <class T, int K, int HALVES_, int MOST = 64> struct Share {
    enum { HALVES = HALVES_, UNITS = T::UNITS, SPREAD = T::SPREAD, STEP = UNITS * 64, SEGMENTS = K / STEP,
           ACROSS = SEGMENTS < WARPS ? SEGMENTS : WARPS, PER = (SEGMENTS + WARPS - 1) / WARPS,
           REGISTERS = UNITS * SETS * HALVES * 8, AT_ONCE = PER % 2 == 0 && 2 * REGISTERS <= MOST ? 2 : 1,
           CHUNKS = PER / AT_ONCE, ALL_HELD = CHUNKS == 1 };
    typedef Unit<HALVES> Held[AT_ONCE][UNITS];

    // chunk번째로 쥐는 것 가운데 s번째 조각.
    __device__ __forceinline__ static int segment(int chunk, int s) {
        return (chunk * AT_ONCE + s) * WARPS + (threadIdx.x >> 5);
    }
    // 그 조각이 있는지.
    __device__ __forceinline__ static bool has(int segment) { return SEGMENTS % WARPS == 0 || segment < SEGMENTS; }
    // 묶음 tile의 (행, 줄)과 (행, 다음 줄)의 합. line은 짝수다. 더하는 차례가 정해져 있어 답은 늘 같다.
    __device__ __forceinline__ static float2 sum(const float* partial, int tile, int row, int line) {
        const float* source = partial + tile * ACROSS * CELLS + cell(row, line);
        float2 whole = {0.f, 0.f};
        #pragma unroll
        for (int a = 0; a < ACROSS; a++) {
            float2 one = *(const float2*)(source + a * CELLS);
            whole.x += one.x, whole.y += one.y;
        }
        return whole;
    }
};

// 잔차에 norm을 건 입력. 블록마다 똑같이 센다: 따로 된 커널이 세고 모두가 다시 읽는 것보다 빠르다.
// 단위 하나 [LINES][64칸]을 레인 열여섯이 줄 하나의 이어진 256바이트씩 읽는다: 레인은 줄 2i + p의 네 칸. norm을 걸고 16비트 둘로
// 나눈 것을 워프마다의 자리(stage)를 거쳐 mma가 받는 차례로 옮긴다.
template <class S, int K, bool BF, bool NORMED> struct NormedInput {
    enum { KEPT = S::ALL_HELD ? S::AT_ONCE * S::UNITS : 1, PAIRS = LINES / 2 };
    const float* x;
    Norm norm;
    float scale;
    float2* scratch;  // [LINES][WARPS]. 다 모은 (평균, 표준편차의 역수)는 줄마다 첫 자리에 있다
    char* stage;      // [8][64칸] 16비트
    uint4 gain[KEPT], shift[KEPT];

    __device__ __forceinline__ static int column(int segment, int u) {
        return segment * S::STEP + u * 64 + (threadIdx.x & 15) * 4;
    }
    __device__ __forceinline__ void read(int segment, int u, uint4 (&v)[PAIRS]) const {
        // x는 앞 커널이 적은 것이지만 기다린 뒤라서 L1을 거쳐 읽어도 된다
        #pragma unroll
        for (int i = 0; i < PAIRS; i++)
            v[i] = *(const uint4*)(x + (size_t)(i * 2 + (threadIdx.x >> 4 & 1)) * K + column(segment, u));
    }
    __device__ __forceinline__ void load_norm(int segment, int u, uint4& gain, uint4& shift) const {
        gain = shift = {0, 0, 0, 0};
        if (NORMED) gain = __ldg((const uint4*)(norm.weight + column(segment, u)));
        if (NORMED && !RMS && norm.bias) shift = __ldg((const uint4*)(norm.bias + column(segment, u)));
    }
    // 기다리기 전에 부른다.
    __device__ __forceinline__ void prime() {
        #pragma unroll
        for (int p = 0; p < KEPT && S::ALL_HELD; p++)
            load_norm(min(S::segment(0, p / S::UNITS), S::SEGMENTS - 1), p % S::UNITS, gain[p], shift[p]);
    }
    // (x - 평균) x 역수 x weight + bias를 16비트 위와 아래 절반으로 나누어, mma가 받는 차례로 b에 담는다.
    __device__ __forceinline__ void pack(const uint4 (&v)[PAIRS], const uint4& gain, const uint4& shift, Unit<2>& b) const {
        int lane = threadIdx.x & 31, g = lane >> 2;
        #pragma unroll
        for (int s = 0; s < SETS; s++) {
            u32 words[2][PAIRS / SETS][2];
            #pragma unroll
            for (int i = 0; i < PAIRS / SETS; i++) {
                const uint4& raw = v[s * (PAIRS / SETS) + i];
                float one[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) one[j] = float_at(raw, j);
                if (NORMED) {
                    float2 moment = scratch[(s * 8 + i * 2 + (lane >> 4)) * WARPS];
                    #pragma unroll
                    for (int j = 0; j < 4; j++)
                        one[j] = (one[j] - moment.x) * moment.y * float_at(gain, j) + float_at(shift, j);
                }
                split_pair<BF>(one[0] * scale, one[1] * scale, words[0][i][0], words[1][i][0]);
                split_pair<BF>(one[2] * scale, one[3] * scale, words[0][i][1], words[1][i][1]);
            }
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                __syncwarp();
                #pragma unroll
                for (int i = 0; i < PAIRS / SETS; i++) {
                    int line = i * 2 + (lane >> 4);
                    *(uint2*)(stage + line * 128 + ((lane & 15) >> 1 ^ (line & 1) * 5) * 16 + (lane & 1) * 8) = {
                        words[half][i][0], words[half][i][1]};
                }
                __syncwarp();
                #pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint4 raw = *(const uint4*)(stage + g * 128 + (column_of<S::SPREAD>(h) / 8 ^ (g & 1) * 5) * 16);
                    u32* to = b.v[s][half] + h * 4;
                    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
                }
            }
        }
    }
    // 줄마다의 moment를 센다. 쥐고 있을 수 있으면 한 번 읽은 것으로 b까지 채운다.
    __device__ __forceinline__ void prepare(typename S::Held& b) {
        uint4 v[KEPT][PAIRS];
        float total[LINES] = {};  // 줄 2i + p의 합과 제곱의 합
        #pragma unroll
        for (int p = 0; p < S::PER * S::UNITS; p++) {
            int segment = S::segment(p / S::UNITS / S::AT_ONCE, p / S::UNITS % S::AT_ONCE);
            if (!S::has(segment) || (!S::ALL_HELD && !NORMED)) continue;
            uint4(&now)[PAIRS] = v[S::ALL_HELD ? p : 0];
            read(segment, p % S::UNITS, now);
            // 분산 = E[x^2] - E[x]^2. 합과 제곱의 합을 한 번 읽으며 모은다
            #pragma unroll
            for (int i = 0; i < LINES * 2; i++) {
                float one = float_at(now[i / 4], i % 4);
                total[i / 4 * 2] += one, total[i / 4 * 2 + 1] += one * one;
            }
        }
        if (NORMED) {
            int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = lane & 15;
            float one = gather<8>(total);
            ((float*)(scratch + ((half >> 1) * 2 + (lane >> 4)) * WARPS + warp))[half & 1] = one;
            __syncthreads();
            // 스레드 열여섯이 줄 하나를 맡아 워프들의 몫을 더한다
            if (threadIdx.x < LINES * WARPS) {
                float2 sum = half < S::ACROSS ? scratch[threadIdx.x] : float2{0.f, 0.f};
                #pragma unroll
                for (int step = WARPS / 2; step; step >>= 1)
                    sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
                float mean = RMS ? 0.f : sum.x / K;
                if (half == 0) scratch[threadIdx.x] = {mean, rsqrtf(fmaxf(sum.y / K - mean * mean, 0.f) + EPS)};
            }
            __syncthreads();
        }
        if (!S::ALL_HELD) return;
        #pragma unroll
        for (int p = 0; p < KEPT; p++)
            if (S::has(S::segment(0, p / S::UNITS))) pack(v[p], gain[p], shift[p], b[p / S::UNITS][p % S::UNITS]);
    }
    // 다 쥐고 있지 못하는 모양(ALL_HELD가 아니다): chunk번째 조각들을 다시 읽어 norm한다.
    __device__ __forceinline__ void fill(typename S::Held& b, int chunk) const {
        #pragma unroll
        for (int p = 0; p < S::AT_ONCE * S::UNITS; p++) {
            int segment = S::segment(chunk, p / S::UNITS);
            if (!S::has(segment)) continue;
            uint4 v[PAIRS], weight, bias;
            read(segment, p % S::UNITS, v);
            load_norm(segment, p % S::UNITS, weight, bias);
            pack(v, weight, bias, b[p / S::UNITS][p % S::UNITS]);
        }
    }
};

// 앞 커널이 16비트로 적어 둔 입력. 줄의 간격은 stride칸이고 아래 절반은 low칸 뒤에 있다. 적는 쪽이 `line_place`로 자리를
// 섞어 두어서, 이웃한 레인 넷이 이어진 64바이트를 읽으면 저마다 제 칸을 얻는다.
template <class S> struct SplitInput {
    const u16* in;
    int stride, low;

    __device__ __forceinline__ void fill(typename S::Held& b, int chunk) const {
        #pragma unroll
        for (int p = 0; p < S::AT_ONCE; p++) {
            int segment = S::segment(chunk, p);
            if (!S::has(segment)) continue;
            #pragma unroll
            for (int i = 0; i < S::UNITS * SETS * S::HALVES * 2; i++) {
                int h = i % 2, half = i / 2 % S::HALVES, s = i / 2 / S::HALVES % SETS, u = i / 2 / S::HALVES / SETS;
                const u16* source = in + (size_t)(s * 8 + (threadIdx.x >> 2 & 7)) * stride + half * low +
                                    segment * S::STEP + u * 64 + column_of<true>(h);
                // 앞 커널의 다른 SM이 적은 것이라 L1을 거치지 않고 L2에서 읽는다
                uint4 raw = __ldcg((const uint4*)source);
                u32* to = b[p][u].v[s][half] + h * 4;
                to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
            }
        }
    }
};

// 묶음 count개의 가중치를 한 조각 앞서 읽으며 곱한다. 합은 partial[묶음][ACROSS][CELLS]에 남는다.
template <class T, class S, class Where> struct LineProduct {
    T piece;
    const Matrix* parts;
    int first, count, tile, chunk;  // tile, chunk: 다음에 읽을 것
    u32 skip = 0;                   // 행에서 건너뛰는 앞의 바이트
    Matrix matrix;                  // 다음에 읽을 조각의 행렬과, 이 레인이 읽을 자리(바이트)
    u32 at;

    // parts[part]로 찾으면 배열이 지역 메모리에 놓일 수 있어, 셋을 비교해 고른다.
    __device__ __forceinline__ Matrix find(int part) const {
        Matrix matrix = parts[0];
        if (part == 1) matrix = parts[1];
        if (part == 2) matrix = parts[2];
        return matrix;
    }
    // 이 워프가 맡은 칸이 있는지.
    __device__ __forceinline__ static bool busy() { return S::ACROSS == WARPS || (int)(threadIdx.x >> 5) < S::ACROSS; }

    // 묶음 first_tile부터 tiles개를 맡는다. 첫 조각의 읽기를 시작한다.
    __device__ __forceinline__ void begin(const Matrix* matrices, int first_tile, int tiles) {
        parts = matrices, first = first_tile, count = tiles, tile = chunk = 0;
        if (!busy() || !tiles) return;
        find_next(0);
        piece.load(matrix, at);
    }
    // 맡은 묶음을 most개까지 L2로 당긴다. 앞 커널을 기다리는 동안 DRAM이 쉬지 않는다.
    __device__ __forceinline__ void prefetch_tiles(int most = LINE_SLOTS) const {
        enum { BYTES = S::SEGMENTS * T::STEP_BYTES, TAKES = (BYTES + 127) / 128, SCALE_BYTES = BYTES / 32 * T::SCALED };
        for (int i = threadIdx.x; i < min(count, most) * T::HEIGHT * TAKES; i += THREADS) {
            int now = first + i / TAKES / T::HEIGHT;
            const Matrix matrix = find(Where::part(now));
            size_t at = ((size_t)Where::tile(now) * T::HEIGHT + i / TAKES % T::HEIGHT) * T::ROW_BYTES + skip;
            prefetch(matrix.weight + at + i % TAKES * 128);
            if (SCALE_BYTES && i % TAKES * 128 < SCALE_BYTES)
                prefetch((const u8*)matrix.scale + at / 32 * T::SCALED + i % TAKES * 128);
        }
    }
    // 다음에 읽을 조각을 찾는다. s: 함께 쥐는 조각들 가운데 몇째인지. 더 읽을 것이 없으면 마지막 것을 다시 읽는다: 읽을지를
    // 따지면 곱하는 명령들이 나뉜다.
    __device__ __forceinline__ void find_next(int s) {
        if (chunk == S::CHUNKS) return;
        int segment = S::segment(chunk, s), row = Where::tile(first + tile) * T::HEIGHT + (threadIdx.x >> 2 & 7);
        if (S::has(segment)) {
            matrix = find(Where::part(first + tile));
            at = (u32)row * T::ROW_BYTES + skip + segment * T::STEP_BYTES;
        }
        if (s == S::AT_ONCE - 1 && ++tile == count) tile = 0, chunk++;
    }
    // 묶음 now의 chunk번째 칸들을 곱한다. b: 그 활성값.
    __device__ __forceinline__ void step(const typename S::Held& b, const float* code, float* partial, int now, int from) {
        int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        float sum[SETS][4] = {};
        #pragma unroll
        for (int s = 0; s < S::AT_ONCE; s++) {
            find_next((s + 1) % S::AT_ONCE);
            if (S::has(S::segment(from, s))) piece.add(b[s], code, sum, matrix, at);
            else piece.load(matrix, at);
        }
        float* target = partial + (now * S::ACROSS + warp) * CELLS;
        #pragma unroll
        for (int i = 0; i < SETS * 2; i++) {
            float2* at = (float2*)(target + cell((lane >> 2) + i % 2 * 8, i / 2 * 8 + (lane & 3) * 2));
            float2 value = {sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]};
            // 둘째 chunk부터는 앞 chunk가 남긴 합에 더한다. 같은 스레드가 적은 자리라 동기화가 없어도 된다
            if (from) value.x += at->x, value.y += at->y;
            *at = value;
        }
    }
    template <class Input> __device__ __forceinline__ void run(const Input& input, typename S::Held& b,
                                                               const float* code, float* partial) {
        if (!busy()) return;
        for (int from = 0; from < S::CHUNKS; from++) {
            if (!S::ALL_HELD) input.fill(b, from);
            for (int now = 0; now < count; now++) step(b, code, partial, now, from);
        }
    }
};

// 공유 메모리: 표 TABLE_BYTES | 8비트 코드표 256 | LoRA의 d [3][RANK][LINES] | norm의 [LINES][WARPS] float2 | 입력을 옮기는
// [WARPS][8][64] 16비트 | 합의 자리 [LINE_SLOTS][WARPS][CELLS] | 행의 마무리 [LINE_SLOTS * ROWS][1 + RANK]. 자리는 lines_plan.py가 센다.
struct LineSpace {
    float* codes;
    float* down;
    float2* scratch;
    char* stage;
    float* partial;
    float* ends;

    __device__ __forceinline__ LineSpace() {
        codes = (float*)(space_begin() + TABLE_BYTES);
        down = codes + (DOWN_AT - TABLE_BYTES) / 4;
        scratch = (float2*)(down + (LINE_SCRATCH_AT - DOWN_AT) / 4);
        stage = (char*)(scratch + WARPS * LINES) + (threadIdx.x >> 5) * LINE_STAGE;
        partial = (float*)(scratch + (LINE_SUMS_AT - LINE_SCRATCH_AT) / 8);
        ends = partial + (LINE_ENDS_AT - LINE_SUMS_AT) / 4;
    }
    __device__ __forceinline__ void fill() const {
        if (WEIGHT == NF4_WEIGHT) build_table<THREADS>((u32*)space_begin());
    }
    // 코드표를 베끼기 시작한다.
    __device__ __forceinline__ void copy_codes(const float* code) const {
        if (DOUBLE_QUANT && threadIdx.x < 256) copy_word(codes + threadIdx.x, code + threadIdx.x);
    }
};

// LoRA의 아래쪽 곱 d[part][RANK][LINES] = A in. 블록마다 제 행이 쓰는 part만 스스로 센다. 합의 자리를 먼저 빌려 쓴다.
template <class S, int K> struct LineLora {
    typedef WideLines<ACT_BF16, K, LORA_TILE == 8, S::UNITS, S::SPREAD> T;
    LineProduct<T, S, OneMatrix> product;
    const Matrix* a;
    int begin, end;  // 묶음의 번호

    // 기다리기 전에 부른다: 첫 조각을 읽기 시작한다.
    __device__ __forceinline__ void prime(const Matrix* matrix, int part_begin, int part_end) {
        a = matrix, begin = part_begin * LORA_TILES, end = part_end * LORA_TILES;
        product.begin(a, begin, min(LINE_SLOTS, end - begin));
        product.prefetch_tiles();
    }
    template <class Input> __device__ __forceinline__ void run(const Input& input, typename S::Held& b, float adapter,
                                                               const LineSpace& space) {
        for (int from = begin; from < end; from += LINE_SLOTS) {
            int count = min(LINE_SLOTS, end - from);
            if (from > begin) product.begin(a, from, count);
            product.run(input, b, space.codes, space.partial);
            __syncthreads();
            for (int e = threadIdx.x; e < count * LORA_TILE * LINES / 2; e += THREADS) {
                int row = e % LORA_TILE, line = e / LORA_TILE % (LINES / 2) * 2, tile = e / LORA_TILE / (LINES / 2);
                // 묶음의 번호에서 어느 part의 몇째 rank인지를 얻는다. RANK를 LORA_TILE의 배수로 채운 행은 버린다
                int r = (from + tile) % LORA_TILES * LORA_TILE + row, part = (from + tile) / LORA_TILES;
                if (r >= RANK) continue;
                float2 sum = S::sum(space.partial, tile, row, line);
                float scale = adapter * (1.f / IN_SCALE);
                *(float2*)(space.down + (part * RANK + r) * LINES + line) = {sum.x * scale, sum.y * scale};
            }
            __syncthreads();
        }
    }
};

// 출력 행들의 마무리에 쓸 bias와 LoRA의 B를 공유 메모리에 베끼기 시작한다. 가중치보다 먼저 부른다: DRAM의 차례가 앞선다.
//   ends: [행][1 + RANK], 행은 first부터 rows개. biased: bias를 더하는 블록인지.
__device__ __forceinline__ void copy_ends(const Linear& linear, int first, int rows, float* ends, bool biased = true) {
    for (int i = threadIdx.x; i < rows; i += THREADS) {
        if (biased && linear.bias) copy_word(ends + i * (1 + RANK), linear.bias + first + i);
        else ends[i * (1 + RANK)] = 0.f;
    }
    if (!RANK || !linear.lora_b) return;
    for (int i = threadIdx.x; i < rows * RANK; i += THREADS)
        copy_word(ends + i / RANK * (1 + RANK) + 1 + i % RANK, linear.lora_b + (size_t)first * RANK + i);
}

// 출력의 마무리: 배율, bias, LoRA의 위쪽 곱. 이웃한 두 줄을 함께 한다. end: 이 행의 [1 + RANK]. down: 이 행이 든 행렬의
// d [RANK][LINES], 어댑터가 없으면 널. row: 선형층 전체에서의 행.
__device__ __forceinline__ float2 finish_lines(const Linear& linear, float2 sum, const float* end, const float* down,
                                               int row, int line) {
    float scale = 1.f / IN_SCALE;
    if (WEIGHT == INT8_WEIGHT) scale *= __ldg(linear.row_scale + row);
    float2 value = {sum.x * scale + end[0], sum.y * scale + end[0]};
    if (!down) return value;
    // W x + B (A x). B에는 배율(alpha / rank)이, A x(down)에는 어댑터를 켰는지가 곱해져 있다
    #pragma unroll 8
    for (int r = 0; r < RANK; r++) {
        float2 d = *(const float2*)(down + r * LINES + line);
        value.x += end[1 + r] * d.x, value.y += end[1 + r] * d.y;
    }
    return value;
}

// MLP의 뒤쪽 행렬에 붙은 LoRA의 몫: act의 행 [first, first + rows)와 A의 곱을 partial[block][RANK][LINES]에 적는다.
// 이어서 도는 블록은 더해 간다. act는 합의 자리에 남겨 둔 fp32다. 묶음 하나의 자리는 stride칸 떨어져 있다.
__device__ __forceinline__ void give_lines(const LoraOfAct& lora, const float* act, int stride, int first, int rows,
                                           int block, bool again) {
    enum { MOST = (LINE_SLOTS * ROWS + 31) / 32 };  // 레인 하나가 맡는 행의 최대 수
    int lane = threadIdx.x & 31;
    for (int r = threadIdx.x >> 5; r < RANK; r += WARPS) {
        // 워프가 rank 하나(A의 행 r)를 맡아, 줄마다 act와의 내적을 구한다. A는 모두 읽기 시작한 다음에 쓴다
        float sum[LINES] = {}, weight[MOST];
        #pragma unroll
        for (int k = 0; k < MOST; k++)
            weight[k] = __ldg(lora.a + (size_t)r * FF + first + min(lane + k * 32, rows - 1));
        #pragma unroll 1
        for (int i = lane; i < rows; i += 32) {  // 펼치면 레지스터가 모자란다. 쥔 것을 하나씩 당겨 쓴다
            float now = weight[0];
            #pragma unroll
            for (int k = 1; k < MOST; k++) weight[k - 1] = weight[k];
            #pragma unroll
            for (int line = 0; line < LINES; line += 2) {
                float2 pair = *(const float2*)(act + i / ROWS * stride + cell(i % ROWS, line));
                sum[line] += now * pair.x, sum[line + 1] += now * pair.y;
            }
        }
        float* target = lora.partial + ((size_t)block * RANK + r) * LINES;
        float whole = gather<16>(sum) * lora.scale;
        if (lane % 2 == 0) target[lane / 2] = again ? target[lane / 2] + whole : whole;
    }
}

// 그 A의 제 칸을 L2로 당긴다.
__device__ __forceinline__ void prefetch_give(const LoraOfAct& lora, int first, int rows) {
    int takes = (rows + 31) / 32;
    for (int i = threadIdx.x; i < RANK * takes; i += THREADS)
        prefetch(lora.a + (size_t)(i / takes) * FF + first + min(i % takes * 32, rows - 1));
}

// 블록들의 몫을 차례로 더해 d [RANK][LINES]를 얻는다. 읽기(load)와 모으기(take)를 나누어 그 사이의 일과 겹친다.
struct LineTaker {
    enum { OUTPUTS = (RANK ? RANK : 1) * LINES, SHARES = OUTPUTS < THREADS ? THREADS / OUTPUTS : 1,
           MINE = (OUTPUTS + THREADS - 1) / THREADS, AT_ONCE = 8 };
    float held[MINE];

    // 스레드가 남으면 SHARES개가 블록들을 나누어 더한다. 더하는 차례가 정해져 있어 답은 늘 같다. AT_ONCE개씩 읽기 시작한 다음에
    // 더하고, 범위를 넘는 것도 가까운 것을 읽고 버린다: 읽을지를 따지면 하나씩 기다린다.
    __device__ __forceinline__ void load(const float* partial, int blocks) {
        #pragma unroll
        for (int m = 0; m < MINE; m++) {
            int e = threadIdx.x + m * THREADS;
            float sum = 0.f;
            #pragma unroll 1
            for (int b = e / OUTPUTS; b < blocks && e < OUTPUTS * SHARES; b += SHARES * AT_ONCE) {
                float one[AT_ONCE];
                #pragma unroll
                for (int k = 0; k < AT_ONCE; k++)
                    one[k] = __ldcg(partial + min(b + k * SHARES, blocks - 1) * OUTPUTS + e % OUTPUTS);
                #pragma unroll
                for (int k = 0; k < AT_ONCE; k++) sum += b + k * SHARES < blocks ? one[k] : 0.f;
            }
            held[m] = sum;
        }
    }
    // 앞뒤로 동기화한다. scratch: [THREADS].
    __device__ __forceinline__ void take(float adapter, float* scratch, float* down) const {
        if (SHARES > 1 && threadIdx.x < OUTPUTS * SHARES) scratch[threadIdx.x] = held[0];
        __syncthreads();
        #pragma unroll
        for (int m = 0; m < MINE; m++) {
            int e = threadIdx.x + m * THREADS;
            if (e >= OUTPUTS) break;
            float sum = SHARES > 1 ? 0.f : held[m];
            for (int share = 0; share < SHARES && SHARES > 1; share++) sum += scratch[share * OUTPUTS + e];
            down[e] = sum * adapter;
        }
        __syncthreads();
    }
};

// 줄마다의 지난 K, V를 L2로 당긴다. 곱하는 동안 DRAM이 쉬고, attention이 곧 읽는다. 볼 위치가 most개를 넘으면 L2에 다 담기지 않을
// 수 있어 당기지 않는다.
__device__ __forceinline__ void prefetch_lines(const Attention& attention, u8* const* pages, const int* state, int most) {
    int line = blockIdx.x % LINES, share = blockIdx.x / LINES, shares = gridDim.x / LINES, position = state[line * 6];
    int oldest = attention.window && position >= attention.window ? position + 1 - attention.window : 0, seen = position - oldest;
    if (share >= shares || seen > most) return;
    for (int i = share * THREADS + threadIdx.x; i < seen * KV_HEADS; i += shares * THREADS) {
        int head = i / seen;
        Page page(pages + line * PAGES, oldest + i % seen);
        #pragma unroll
        for (int kind = 0; kind < 2; kind++) {
            for (int at = 0; at < HEAD_DIM; at += 128) prefetch(page.values(kind, attention.layer, head) + at);
            if (page.slot % 16 == 0 || i % seen == 0) prefetch(page.scales(kind, attention.layer, head));
        }
    }
}

// 잔차를 읽어 norm하고 선형층 하나(또는 나란한 여럿)를 곱한다. `project_job`과 같은 것을 모든 줄에 한다.
//   prefetch_rest: 이 커널의 것을 다 당긴 다음에 당길 것.
template <bool MLP, class Prefetch>
__device__ __forceinline__ void project_lines_job(const float* x, const Norm& norm, const Linear& linear,
                                                  const LoraOfAct& next_lora, const float* code, float adapter,
                                                  int block, int blocks, float* out, u16* act,
                                                  const Prefetch& prefetch_rest) {
    enum { PAIR = MLP && GATED ? 2 : 1, PARTS = MLP ? PAIR : QKV_PARTS, AT_ONCE = LINE_SLOTS / PAIR,
           UNITS = MLP ? FF / ROWS : (QDIM + 2 * KVDIM) / ROWS };
    typedef typename Choose<PARTS == 2, GateAndUp, OneMatrix>::Type OneOrTwo;
    typedef typename Choose<PARTS == 3, QkvMatrices, OneOrTwo>::Type Where;
    typedef LinePiece<HIDDEN> T;
    typedef Share<T, HIDDEN, 2> S;
// 1. 기다리기 전: 가중치와 LoRA의 A와 B를 미리 읽고 표를 만든다
    int first = UNITS * block / blocks, last = UNITS * (block + 1) / blocks, count = min(AT_ONCE, last - first);
    LineSpace space;
    float* up_ends = space.ends + AT_ONCE * ROWS * (1 + RANK);
    auto copy_all_ends = [&](int unit, int units) {
        copy_ends(linear, unit * ROWS, units * ROWS, space.ends);
        if (PAIR == 2) copy_ends(linear, FF + unit * ROWS, units * ROWS, up_ends);
    };
    space.copy_codes(code);
    copy_all_ends(first, count);
    end_of_copies();
    NormedInput<S, HIDDEN, ACT_BF16, PRE_NORM> input = {x, norm, IN_SCALE, space.scratch, space.stage};
    input.prime();
    bool adapted = RANK && linear.lora_a.weight && first < last;
    bool gives = MLP && RANK && next_lora.a;
    LineLora<S, HIDDEN> lora;
    if (adapted) lora.prime(&linear.lora_a, MLP ? 0 : Where::part(first), MLP ? PARTS : Where::part(last - 1) + 1);
    LineProduct<T, S, Where> product;
    product.begin(linear.part, first * PAIR, count * PAIR);
    product.prefetch_tiles();
    if (gives) prefetch_give(next_lora, first * ROWS, (last - first) * ROWS);
    prefetch_rest();
    space.fill();
// 2. 잔차를 읽어 norm한다. LoRA의 아래쪽 곱도 여기서 센다
    wait_for_previous_kernel();
    typename S::Held b;
    input.prepare(b);
    wait_for_copies<0>();
    __syncthreads();  // 표가 다 만들어졌다
    if (adapted) lora.run(input, b, adapter, space);
    const float* down = adapted ? space.down : 0;
    // 합의 자리가 묶음 LINE_SLOTS개의 것이라, 맡은 묶음이 더 많으면 나누어 돈다
    for (int begin = first; begin < last; begin += AT_ONCE) {
        count = min(AT_ONCE, last - begin);
// 3. 곱한다
        product.run(input, b, space.codes, space.partial);
        wait_for_copies<0>();
        __syncthreads();
        if (begin + count < last)
            product.begin(linear.part, (begin + count) * PAIR, min(AT_ONCE, last - begin - count) * PAIR);
// 4. 스레드 하나가 행 하나의 이웃한 두 줄을 마무리한다. 이웃한 스레드는 이웃한 행이라 이어서 적는다
        for (int e = threadIdx.x; e < count * CELLS / 2; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % (LINES / 2) * 2, unit = e / (CELLS / 2), row = (begin + unit) * ROWS + inside;
            const float* end = space.ends + (unit * ROWS + inside) * (1 + RANK);
            float2 value = S::sum(space.partial, unit * PAIR, inside, line);
            if (!MLP) {
                const float* mine = down ? down + Where::part(begin + unit) * RANK * LINES : 0;
                value = finish_lines(linear, value, end, mine, row, line);
                out[(size_t)line * (QDIM + 2 * KVDIM) + row] = value.x;
                out[(size_t)(line + 1) * (QDIM + 2 * KVDIM) + row] = value.y;
                continue;
            }
            // gate와 up의 묶음이 번갈아 있다: gate의 합은 2 unit번째, up의 합은 2 unit + 1번째 자리에 있다
            value = finish_lines(linear, value, end, down, row, line);
            value = {activate(value.x), activate(value.y)};
            if (PAIR == 2) {
                float2 up = finish_lines(linear, S::sum(space.partial, unit * 2 + 1, inside, line),
                                         up_ends + (unit * ROWS + inside) * (1 + RANK),
                                         down ? down + RANK * LINES : 0, FF + row, line);
                value.x *= up.x, value.y *= up.y;
            }
            u16* high = act + (size_t)line * FF + line_place(row);
            store_split<ACT_BF16>(high, high + (size_t)LINES * FF, value.x * IN_SCALE);
            store_split<ACT_BF16>(high + FF, high + (size_t)(LINES + 1) * FF, value.y * IN_SCALE);
// 이 자리는 이 스레드만 읽었다. 다음 커널의 LoRA가 쓸 몫을 세려고 남긴다
            if (gives) *(float2*)(space.partial + unit * PAIR * S::ACROSS * CELLS + cell(inside, line)) = value;
        }
        __syncthreads();
        if (gives) {
            give_lines(next_lora, space.partial, PAIR * S::ACROSS * CELLS, begin * ROWS, count * ROWS, block,
                       begin > first);
            __syncthreads();
        }
        if (begin + count >= last) break;
        copy_all_ends(begin + count, min(AT_ONCE, last - begin - count));
    }
}

// qkv 또는 MLP의 앞쪽, 병렬 잔차면 둘 다. 앞의 qkv_blocks개 블록이 qkv를 맡는다.
//   attention, pages, state, most: `prefetch_lines`의 것. qkv를 맡은 커널만 한다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) project_lines(
    const float* x, Norm norm1, Linear qkv, Norm norm2, Linear mlp, LoraOfAct down_lora, const float* code,
    const float* adapter, int qkv_blocks, float* out, u16* act, Attention attention, u8* const* pages, const int* state,
    int most) {
    let_next_kernel_start();
    auto prefetch_rest = [&] {
        if (qkv_blocks) prefetch_lines(attention, pages, state, most);
    };
    if ((int)blockIdx.x < qkv_blocks)
        project_lines_job<false>(x, norm1, qkv, down_lora, code, *adapter, blockIdx.x, qkv_blocks, out, act, prefetch_rest);
    else
        project_lines_job<true>(x, norm2, mlp, down_lora, code, *adapter, blockIdx.x - qkv_blocks,
                                gridDim.x - qkv_blocks, out, act, prefetch_rest);
}

// 잔차에 더하는 선형층. `contract_job`과 같은 것을 모든 줄에 한다. 병렬 잔차면 두 선형층을 함께 한다.
// 블록 CUTS개가 칸을 나누어 맡는다: 블록마다 모든 칸의 활성값을 읽으면 L2가 바쁘다. 저마다의 합을 parts에 적고, 마지막에 끝난
// 블록이 정해진 차례로 더한다.
//   mlp_blocks: act를 만든 블록의 수. POST_NORM이면 더하지 않고 y에 적는다.
//   parts: fp32 [CUTS][LINES][HIDDEN], done: [블록의 수 / CUTS]는 늘 0으로 되돌려 놓는다
template <bool OUT, bool DOWN, int CUTS>
__device__ __forceinline__ void contract_lines_job(float* x, float* y, const u16* attended, const u16* act,
                                                   const float* code, float adapter, const Linear& out,
                                                   const Linear& down, const LoraOfAct& down_lora, int mlp_blocks,
                                                   float* parts, int* done) {
    enum { HALVES = WEIGHT == WIDE_WEIGHT ? 2 : 1, AT_ONCE = LINE_SLOTS / (OUT + DOWN), UNITS = HIDDEN / ROWS,
           OUT_WIDTH = QDIM / CUTS, DOWN_WIDTH = FF / CUTS };
    typedef LinePiece<QDIM, OUT_WIDTH> OutPiece;
    typedef LinePiece<FF, DOWN_WIDTH> DownPiece;
    typedef Share<OutPiece, OUT_WIDTH, HALVES> OutShare;
    typedef Share<DownPiece, DOWN_WIDTH, HALVES, LINE_REGISTERS> DownShare;
// 1. 기다리기 전: 두 선형층의 가중치와 LoRA의 A와 B를 미리 읽는다
    int cut = blockIdx.x % CUTS, group = blockIdx.x / CUTS, groups = gridDim.x / CUTS;
    int first = UNITS * group / groups, last = UNITS * (group + 1) / groups, count = min(AT_ONCE, last - first);
    LineProduct<OutPiece, OutShare, OneMatrix> out_product;
    LineProduct<DownPiece, DownShare, OneMatrix> down_product;
    out_product.skip = cut * (OutPiece::ROW_BYTES / CUTS), down_product.skip = cut * (DownPiece::ROW_BYTES / CUTS);
    LineSpace space;
    float *down_d = space.down + RANK * LINES, *down_ends = space.ends + (OUT ? AT_ONCE * ROWS * (1 + RANK) : 0);
    auto copy_all_ends = [&](int unit, int units) {
        if (OUT) copy_ends(out, unit * ROWS, units * ROWS, space.ends, cut == 0);
        if (DOWN) copy_ends(down, unit * ROWS, units * ROWS, down_ends, cut == 0);
    };
    space.copy_codes(code);
    copy_all_ends(first, count);
    end_of_copies();
    bool out_adapted = OUT && RANK && out.lora_a.weight;
    bool down_adapted = DOWN && RANK && down_lora.a;
    LineLora<OutShare, QDIM> lora;
    lora.product.skip = cut * (QDIM * 2 / CUTS);
    if (out_adapted) lora.prime(&out.lora_a, 0, 1);
    if (OUT) out_product.begin(out.part, first, count), out_product.prefetch_tiles();
    if (DOWN) down_product.begin(down.part, first, count), down_product.prefetch_tiles();
    space.fill();
    wait_for_previous_kernel();
    // attended는 줄마다 위와 아래가 이어져 있고, act는 모든 줄의 위 다음에 모든 줄의 아래가 있다
    SplitInput<OutShare> out_input = {attended + cut * OUT_WIDTH, 2 * QDIM, QDIM};
    SplitInput<DownShare> down_input = {act + cut * DOWN_WIDTH, FF, LINES * FF};
    float* down_partial = space.partial + (OUT ? AT_ONCE * OutShare::ACROSS * CELLS : 0);
    LineTaker taker;
    int taken = mlp_blocks * cut / CUTS;
    if (down_adapted)
        taker.load(down_lora.partial + taken * RANK * LINES, mlp_blocks * (cut + 1) / CUTS - taken);
    typename OutShare::Held out_b;
    typename DownShare::Held down_b;
    if (OUT && OutShare::ALL_HELD) out_input.fill(out_b, 0);
    if (DOWN && DownShare::ALL_HELD) down_input.fill(down_b, 0);
    wait_for_copies<0>();
    __syncthreads();
    if (out_adapted) lora.run(out_input, out_b, adapter, space);
    for (int begin = first; begin < last; begin += AT_ONCE) {
        count = min(AT_ONCE, last - begin);
        if (begin > first) {
            if (OUT) out_product.begin(out.part, begin, count);
            if (DOWN) down_product.begin(down.part, begin, count);
        }
// 2. 곱한다. 두 선형층이면 묶음마다 번갈아 해서 읽기를 기다리는 시간을 겹친다
        if (OUT && DOWN && OutShare::ALL_HELD && DownShare::ALL_HELD) {
            for (int now = 0; now < count; now++) {
                if (out_product.busy()) out_product.step(out_b, space.codes, space.partial, now, 0);
                if (down_product.busy()) down_product.step(down_b, space.codes, down_partial, now, 0);
            }
        } else {
            if (OUT) out_product.run(out_input, out_b, space.codes, space.partial);
            if (DOWN) down_product.run(down_input, down_b, space.codes, down_partial);
        }
        if (down_adapted && begin == first) taker.take(adapter, (float*)space.scratch, down_d);
        wait_for_copies<0>();
        __syncthreads();
// 3. 줄과 행마다 스레드가 하나라 제자리에서 더한다
        for (int e = threadIdx.x; e < count * CELLS / 2; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % (LINES / 2) * 2, unit = e / (CELLS / 2), row = (begin + unit) * ROWS + inside;
            int end = (unit * ROWS + inside) * (1 + RANK);
            float2 sum = {0.f, 0.f};
            if (OUT)
                sum = finish_lines(out, OutShare::sum(space.partial, unit, inside, line), space.ends + end,
                                   out_adapted ? space.down : 0, row, line);
            if (DOWN) {
                float2 more = finish_lines(down, DownShare::sum(down_partial, unit, inside, line), down_ends + end,
                                           down_adapted ? down_d : 0, row, line);
                sum.x += more.x, sum.y += more.y;
            }
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                size_t at = (size_t)(line + i) * HIDDEN + row;
                float one = i ? sum.y : sum.x;
                if (CUTS > 1) parts[cut * LINES * HIDDEN + at] = one;
                else if (POST_NORM) y[at] = one;
                else x[at] = __ldcg(x + at) + one * RESIDUAL_SCALE;
            }
        }
        __syncthreads();
        if (begin + count >= last) break;
        copy_all_ends(begin + count, min(AT_ONCE, last - begin - count));
    }
    if (CUTS == 1) return;
// 4. 같은 행들을 맡은 블록 가운데 마지막에 끝난 것이 합을 더한다
    __threadfence();
    __syncthreads();
    __shared__ bool is_last;
    if (threadIdx.x == 0) is_last = atomicAdd(done + group, 1) == CUTS - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) done[group] = 0;
    for (int e = threadIdx.x; e < (last - first) * CELLS; e += THREADS) {
        size_t at = (size_t)(e / ROWS % LINES) * HIDDEN + (first + e / CELLS) * ROWS + e % ROWS;
        float sum = 0.f, one[CUTS], before = POST_NORM ? 0.f : __ldcg(x + at);
        #pragma unroll
        for (int i = 0; i < CUTS; i++) one[i] = __ldcg(parts + i * LINES * HIDDEN + at);
        #pragma unroll
        for (int i = 0; i < CUTS; i++) sum += one[i];
        if (POST_NORM) y[at] = sum;
        else x[at] = before + sum * RESIDUAL_SCALE;
    }
}

#define CONTRACT_LINES(NAME, OUT, DOWN, CUTS)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                     \
        float* x, float* y, const u16* attended, const u16* act, const float* code, const float* adapter, Linear out,  \
        Linear down, LoraOfAct down_lora, int mlp_blocks, float* parts, int* done) {                                   \
        let_next_kernel_start();                                                                                       \
        contract_lines_job<OUT, DOWN, CUTS>(x, y, attended, act, code, *adapter, out, down, down_lora, mlp_blocks,     \
                                            parts, done);                                                              \
    }
#if PARALLEL
CONTRACT_LINES(contract_lines, true, true, OUT_CUTS)
#else
CONTRACT_LINES(contract_attention_lines, true, false, OUT_CUTS)
CONTRACT_LINES(contract_mlp_lines, false, true, DOWN_CUTS)
#endif

// logits[LINES][LOGITS] = W norm(x) * LOGIT_SCALE, 한계가 있으면 tanh로 누른다. weight의 행은 16의 배수까지 있다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) head_lines(const float* x, Norm norm, Linear linear,
                                                                    float* logits) {
    typedef WideLines<BF16, HIDDEN, false, 1, true> T;
    typedef Share<T, HIDDEN, 2> S;
    enum { UNITS = (VOCAB + ROWS - 1) / ROWS };
    let_next_kernel_start();
    int first = LINE_TILES(UNITS), last = (int)((u64)UNITS * (blockIdx.x + 1) / gridDim.x);
    LineProduct<T, S, OneMatrix> product;
    // 넓은 행렬이라 다 당기면 L2를 넘는다. 입력을 기다리고 합을 마무리하는 동안 읽을 만큼만 당긴다
    product.begin(linear.part, first, min(LINE_SLOTS, last - first));
    product.prefetch_tiles(2);
    LineSpace space;
    NormedInput<S, HIDDEN, BF16, true> input = {x, norm, 1.f, space.scratch, space.stage};
    input.prime();
    wait_for_previous_kernel();
    typename S::Held b;
    input.prepare(b);
    for (int begin = first; begin < last; begin += LINE_SLOTS) {
        int count = min(LINE_SLOTS, last - begin);
        // 출력 행렬은 늘 16비트라 NF4의 표와 절댓값의 코드가 필요 없다
        product.run(input, b, 0, space.partial);
        __syncthreads();
        if (begin + count < last) {
            product.begin(linear.part, begin + count, min(LINE_SLOTS, last - begin - count));
            product.prefetch_tiles(2);
        }
        for (int e = threadIdx.x; e < count * CELLS / 2; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % (LINES / 2) * 2, unit = e / (CELLS / 2), row = (begin + unit) * ROWS + inside;
            if (row >= VOCAB) continue;  // 16의 배수까지 채운 행은 적지 않는다
            float2 sum = S::sum(space.partial, unit, inside, line);
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float logit = (i ? sum.y : sum.x) * LOGIT_SCALE;
                if (LOGIT_CAP > 0.f) logit = LOGIT_CAP * tanhf(logit * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f)));
                logits[(size_t)(line + i) * LOGITS + row] = logit;
            }
        }
        __syncthreads();
    }
}

#if POST_NORM
// 앞 선형층의 출력 y에 norm을 걸어 잔차 x에 더한다. grid (LINES).
extern "C" __global__ void __launch_bounds__(THREADS) post_lines(float* x, const float* y, const float* post) {
    __shared__ float2 scratch[WARPS];
    let_next_kernel_start();
    size_t at = (size_t)blockIdx.x * HIDDEN;
    // 블록 하나가 줄 하나를 맡아 잔차, y, norm의 weight를 레지스터에 쥔다. weight는 기다리기 전에 읽는다
    Row row, more, weight;
    weight.load_constant(post);
    wait_for_previous_kernel();
    row.load(x + at), more.load(y + at);
    float factor = moments(more, scratch).y;
    #pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i < HIDDEN) x[at + i] = row.v[j] + more.v[j] * factor * weight.v[j];
    }
}
#endif
