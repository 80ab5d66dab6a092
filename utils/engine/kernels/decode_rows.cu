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
#define LINE_TILES(units) ((int)((u64)(units) * blockIdx.x / gridDim.x))

static_assert(LINES == 16, "cell의 섞는 법이 줄 16개에 맞춘 것이다");

// 묶음 하나의 합 [ROWS][LINES]에서 (행, 줄)의 자리. 줄의 번호를 행에 따라 섞어 은행 충돌 없이 줄로도 행으로도 읽는다.
__device__ __forceinline__ int cell(int row, int line) {
    int r = row >> 1;
    return row * LINES + (line ^ ((r & 1) << 3 | (r & 6)));
}

// 단위는 칸 64개다. 레인 4g + t는 줄 g와 g + 8의 16칸을 8칸짜리 둘로 쥔다. column_of는 h번째 8칸이 시작하는 칸이다.
// 16비트 가중치는 이웃한 레인 넷이 이어진 64바이트를 읽도록 8칸씩 번갈아 놓는다(SPREAD).
template <bool SPREAD> __device__ __forceinline__ int column_of(int h) {
    int t = threadIdx.x & 3;
    return SPREAD ? h * 32 + t * 8 : t * 16 + h * 8;
}

// 단위 하나의 활성값: 16비트 16칸을 두 칸씩. HALVES가 2면 위와 아래 절반이다.
template <int HALVES> struct Unit { u32 v[SETS][HALVES][8]; };

// 가중치의 조각(행 16개 x 칸 64 * UNITS개). 레인은 행 g와 g + 8의 칸을 맡는다.
// sum[s]의 넷: (행 g, 줄 8s + 2t), (g, 8s + 2t + 1), (g + 8, 8s + 2t), (g + 8, 8s + 2t + 1).
template <bool BF, int K, bool HALF, int U, bool SPREAD_> struct WideLines {
    enum { UNITS = U, SPREAD = SPREAD_, ROW_BYTES = K * 2, STEP_BYTES = UNITS * 128, HEIGHT = HALF ? 8 : ROWS,
           SCALED = 0 };
    uint4 top[UNITS][2], low[HALF ? 1 : UNITS][2];

    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        // 단위(64칸)마다 레인은 16바이트 둘, 곧 8칸 둘을 읽는다. 8행 아래의 행은 8 * ROW_BYTES 뒤에 있다
        #pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
            const u8* source = m.weight + at + (i / 2 * 64 + column_of<SPREAD>(i % 2)) * 2;
            top[i / 2][i % 2] = load_weight(source);
            if (!HALF) low[HALF ? 0 : i / 2][i % 2] = load_weight(source + 8 * ROW_BYTES);
        }
    }
    template <int HALVES> __device__ __forceinline__ void add(const Unit<HALVES> (&b)[UNITS], const float*,
                                                              float (&sum)[SETS][4]) const {
        #pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
            int u = i / 2, h = i % 2;
            const uint4& a = top[u][h];
            uint4 d = {0, 0, 0, 0};
            if (!HALF) d = low[HALF ? 0 : u][h];
            #pragma unroll
            for (int j = 0; j < SETS * HALVES; j++) {
                const u32* in = b[u].v[j / HALVES][j % HALVES] + h * 4;
                // mma 하나는 행 16개 x 칸 16개 x 줄 8개다. 레인은 위 행과 아래 행의 같은 칸 넷, 줄의 같은 칸 넷을 낸다
                mma<BF>(sum[j / HALVES], a.x, d.x, a.y, d.y, in[0], in[1]);
                mma<BF>(sum[j / HALVES], a.z, d.z, a.w, d.w, in[2], in[3]);
            }
        }
    }
};

// NF4: 단위가 절댓값 블록 하나라서, 단위의 합에 절댓값을 한 번만 곱한다.
template <int K> struct Nf4Lines {
    enum { UNITS = K % (128 * WARPS) ? 1 : 2, SPREAD = 0, ROW_BYTES = K / 2, STEP_BYTES = UNITS * 32, HEIGHT = ROWS,
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
    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 8;
        #pragma unroll
        for (int u = 0; u < UNITS; u++) {
            top[u] = load_weight8(source + u * 32);
            low[u] = load_weight8(source + 8 * ROW_BYTES + u * 32);
        }
        offset = m.offset;
        load_scale(m, at, top_scale);
        load_scale(m, at + 8 * ROW_BYTES, low_scale);
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
                                                              float (&sum)[SETS][4]) const {
        u32 lane = (threadIdx.x & 31) * 4;
        #pragma unroll
        for (int u = 0; u < UNITS; u++) {
            // 절댓값을 곱하기 전의 합. 절댓값은 행마다 다르므로 위 행(above)과 아래 행(below)에 따로 곱한다
            float c[SETS][4] = {};
            #pragma unroll
            for (int h = 0; h < 2; h++) {
// 표에서 꺼낸 가중치는 모든 줄이 함께 쓴다. 한 줄일 때와 달리 꺼내는 값이 거의 들지 않는다
                u32 a = h ? top[u].y : top[u].x, d = h ? low[u].y : low[u].x;
                u32 w[8] = {pair_at<0>(a, lane), pair_at<0>(d, lane), pair_at<1>(a, lane), pair_at<1>(d, lane),
                            pair_at<2>(a, lane), pair_at<2>(d, lane), pair_at<3>(a, lane), pair_at<3>(d, lane)};
                #pragma unroll
                for (int j = 0; j < SETS * HALVES; j++) {
                    const u32* in = b[u].v[j / HALVES][j % HALVES] + h * 4;
                    mma<false>(c[j / HALVES], w[0], w[1], w[2], w[3], in[0], in[1]);
                    mma<false>(c[j / HALVES], w[4], w[5], w[6], w[7], in[2], in[3]);
                }
            }
            float above = decode(top_scale, u, code), below = decode(low_scale, u, code);
            #pragma unroll
            for (int s = 0; s < SETS; s++) {
                sum[s][0] += c[s][0] * above, sum[s][1] += c[s][1] * above;
                sum[s][2] += c[s][2] * below, sum[s][3] += c[s][3] * below;
            }
        }
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
                                                              float (&sum)[SETS][4]) const {
        u32 a[4] = {top.x, top.y, top.z, top.w}, d[4] = {low.x, low.y, low.z, low.w};
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            // int8 넷을 fp16 넷으로 푼다. -128부터 127까지는 fp16에 어긋남 없이 들어간다
            uint2 above = int8_to_fp16(a[q]), below = int8_to_fp16(d[q]);
            #pragma unroll
            for (int j = 0; j < SETS * HALVES; j++) {
                const u32* in = b[0].v[j / HALVES][j % HALVES] + q * 2;
                mma<false>(sum[j / HALVES], above.x, below.x, above.y, below.y, in[0], in[1]);
            }
        }
    }
};

#if WEIGHT == NF4_WEIGHT
template <int K> using LinePiece = Nf4Lines<K>;
#elif WEIGHT == INT8_WEIGHT
template <int K> using LinePiece = Int8Lines<K>;
#else
template <int K> using LinePiece = WideLines<BF16, K, false, 1, true>;
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
    // 묶음 tile의 (행, 줄)의 합. 더하는 차례가 정해져 있어 답은 늘 같다.
    __device__ __forceinline__ static float sum(const float* partial, int tile, int row, int line) {
        const float* source = partial + tile * ACROSS * CELLS + cell(row, line);
        float whole = 0.f;
        #pragma unroll
        for (int a = 0; a < ACROSS; a++) whole += source[a * CELLS];
        return whole;
    }
};

// 잔차에 norm을 건 입력. 블록마다 똑같이 센다: 따로 된 커널이 세고 모두가 다시 읽는 것보다 빠르다.
template <class S, int K, bool BF, bool NORMED> struct NormedInput {
    const float* x;
    Norm norm;
    float scale;
    float2 moment[SETS];  // 레인의 두 줄의 (평균, 표준편차의 역수)

    // 레인 4g + t가 쥐는 줄: s번째 여덟 줄 가운데 g번째.
    __device__ __forceinline__ static int line(int s) { return s * 8 + (threadIdx.x >> 2 & 7); }

    // 단위 하나의 두 줄. x는 앞 커널이 적은 것이지만 기다린 뒤라서 L1을 거쳐 읽어도 된다. 한 섹터를 두 번에 나누어 읽는다.
    __device__ __forceinline__ void read(int segment, int u, float (&v)[SETS][16]) const {
        #pragma unroll
        for (int i = 0; i < SETS * 4; i++) {
            int s = i / 4, q = i % 4;
            uint4 raw = *(const uint4*)(x + (size_t)line(s) * K + segment * S::STEP + u * 64 +
                                        column_of<S::SPREAD>(q / 2) + q % 2 * 4);
            v[s][q * 4] = __uint_as_float(raw.x), v[s][q * 4 + 1] = __uint_as_float(raw.y);
            v[s][q * 4 + 2] = __uint_as_float(raw.z), v[s][q * 4 + 3] = __uint_as_float(raw.w);
        }
    }
    // norm의 weight나 bias 네 칸. 배우지 않는 값이라 읽기 전용 cache로 읽는다.
    __device__ __forceinline__ static void constant(const float* at, float (&v)[4]) {
        uint4 raw = __ldg((const uint4*)at);
        v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
        v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
    }
    // (x - 평균) x 역수 x weight + bias를 16비트 위와 아래 절반으로 나누어, mma가 받는 차례로 b에 담는다.
    __device__ __forceinline__ void pack(int segment, int u, const float (&v)[SETS][16], Unit<2>& b) const {
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            int column = segment * S::STEP + u * 64 + column_of<S::SPREAD>(q / 2) + q % 2 * 4;
            float weight[4], bias[4] = {};
            if (NORMED) constant(norm.weight + column, weight);
            if (NORMED && !RMS && norm.bias) constant(norm.bias + column, bias);
            #pragma unroll
            for (int i = 0; i < SETS * 2; i++) {
                int s = i / 2, j = i % 2 * 2;
                float pair[2] = {v[s][q * 4 + j], v[s][q * 4 + j + 1]};
                if (NORMED) {
                    pair[0] = (pair[0] - moment[s].x) * moment[s].y * weight[j] + bias[j];
                    pair[1] = (pair[1] - moment[s].x) * moment[s].y * weight[j + 1] + bias[j + 1];
                }
                split_pair<BF>(pair[0] * scale, pair[1] * scale, b.v[s][0][q * 2 + j / 2], b.v[s][1][q * 2 + j / 2]);
            }
        }
    }
    // 줄마다의 moment를 센다. 쥐고 있을 수 있으면 한 번 읽은 것으로 b까지 채운다. scratch: [WARPS][LINES].
    __device__ __forceinline__ void prepare(typename S::Held& b, float2* scratch) {
        float v[S::ALL_HELD ? S::AT_ONCE * S::UNITS : 1][SETS][16];
        float2 total[SETS] = {};
        #pragma unroll
        for (int p = 0; p < S::PER; p++) {
            int segment = S::segment(p / S::AT_ONCE, p % S::AT_ONCE);
            if (segment >= S::SEGMENTS || (!S::ALL_HELD && !NORMED)) continue;
            #pragma unroll
            for (int u = 0; u < S::UNITS; u++) {
                float(&now)[SETS][16] = v[S::ALL_HELD ? p * S::UNITS + u : 0];
                read(segment, u, now);
                // 분산 = E[x^2] - E[x]^2. 합과 제곱의 합을 한 번 읽으며 모은다
                #pragma unroll
                for (int i = 0; i < SETS * 16; i++)
                    total[i / 16].x += now[i / 16][i % 16],
                    total[i / 16].y += now[i / 16][i % 16] * now[i / 16][i % 16];
            }
        }
        if (NORMED) {
            #pragma unroll
            for (int s = 0; s < SETS; s++) {
                // 줄 하나를 나누어 쥔 레인 넷을 먼저 더하고, 워프의 몫은 공유 메모리에서 더한다
                for (int step = 1; step < 4; step <<= 1)
                    total[s].x += __shfl_xor_sync(~0u, total[s].x, step),
                    total[s].y += __shfl_xor_sync(~0u, total[s].y, step);
                if ((threadIdx.x & 3) == 0) scratch[(threadIdx.x >> 5) * LINES + line(s)] = total[s];
            }
            __syncthreads();
            #pragma unroll
            for (int s = 0; s < SETS; s++) {
                float2 sum = {0.f, 0.f};
                #pragma unroll
                for (int w = 0; w < S::ACROSS; w++) {
                    float2 one = scratch[w * LINES + line(s)];
                    sum.x += one.x, sum.y += one.y;
                }
                float mean = RMS ? 0.f : sum.x / K;
                moment[s] = {mean, rsqrtf(fmaxf(sum.y / K - mean * mean, 0.f) + EPS)};
            }
        }
        if (!S::ALL_HELD) return;
        #pragma unroll
        for (int p = 0; p < S::AT_ONCE; p++) {
            if (S::segment(0, p) >= S::SEGMENTS) continue;
            #pragma unroll
            for (int u = 0; u < S::UNITS; u++)
                pack(S::segment(0, p), u, v[S::ALL_HELD ? p * S::UNITS + u : 0], b[p][u]);
        }
    }
    // 다 쥐고 있지 못하는 모양(ALL_HELD가 아니다): chunk번째 조각들을 다시 읽어 norm한다.
    __device__ __forceinline__ void fill(typename S::Held& b, int chunk) const {
        #pragma unroll
        for (int p = 0; p < S::AT_ONCE; p++) {
            int segment = S::segment(chunk, p);
            if (segment >= S::SEGMENTS) continue;
            #pragma unroll
            for (int u = 0; u < S::UNITS; u++) {
                float v[SETS][16];
                read(segment, u, v);
                pack(segment, u, v, b[p][u]);
            }
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
            if (segment >= S::SEGMENTS) continue;
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

// 묶음 count개의 가중치를 AHEAD조각(1이나 2) 앞서 읽으며 곱한다. 합은 partial[묶음][ACROSS][CELLS]에 남는다.
template <class T, class S, class Where, int AHEAD = LINE_AHEAD> struct LineProduct {
    T pieces[AHEAD];
    const Matrix* parts;
    int first, count, total, tile, chunk;  // tile, chunk: 다음에 읽을 것

    // 묶음 first_tile부터 tiles개를 맡는다. 읽기는 begin에서 시작한다.
    __device__ __forceinline__ void set(const Matrix* matrices, int first_tile, int tiles) {
        parts = matrices, first = first_tile, count = tiles;
    }
    // parts[part]로 찾으면 배열이 지역 메모리에 놓일 수 있어, 셋을 비교해 고른다.
    __device__ __forceinline__ Matrix find(int part) const {
        Matrix matrix = parts[0];
        if (part == 1) matrix = parts[1];
        if (part == 2) matrix = parts[2];
        return matrix;
    }
    __device__ __forceinline__ void begin(const Matrix* matrices, int first_tile, int tiles) {
        set(matrices, first_tile, tiles), tile = chunk = 0;
        // 묶음마다 조각 PER개다. 맡을 조각이 없는 워프는 하나도 읽지 않는다
        total = (int)(threadIdx.x >> 5) < S::ACROSS ? tiles * S::PER : 0;
        #pragma unroll
        for (int d = 0; d < AHEAD; d++)
            if (d < total) load(d, d % S::AT_ONCE);
    }
    // 맡은 묶음 모두를 L2로 당긴다. 묶음 하나의 행 HEIGHT개는 메모리에 이어져 있다. 앞 커널을 기다리는 동안 DRAM이 쉬지 않는다.
    __device__ __forceinline__ void prefetch_all() const {
        enum { BYTES = T::HEIGHT * T::ROW_BYTES, TAKES = BYTES / 128, SCALE_BYTES = BYTES / 32 * T::SCALED };
        for (int i = threadIdx.x; i < count * TAKES; i += THREADS) {
            int now = first + i / TAKES;
            const Matrix matrix = find(Where::part(now));
            prefetch(matrix.weight + (size_t)Where::tile(now) * BYTES + i % TAKES * 128);
            if (SCALE_BYTES && i % TAKES * 128 < SCALE_BYTES)
                prefetch((const u8*)matrix.scale + (size_t)Where::tile(now) * SCALE_BYTES + i % TAKES * 128);
        }
    }
// 다음 조각을 pieces[d]에 읽는다. s: 함께 쥐는 조각들 가운데 몇째인지.
    __device__ __forceinline__ void load(int d, int s) {
        int segment = S::segment(chunk, s);
        if (segment < S::SEGMENTS) {
            const Matrix matrix = find(Where::part(first + tile));
            int row = Where::tile(first + tile) * T::HEIGHT + (threadIdx.x >> 2 & 7);
            pieces[d].load(matrix, (u32)row * T::ROW_BYTES + segment * T::STEP_BYTES);
        }
        if (s < S::AT_ONCE - 1) return;
        if (++tile == count) tile = 0, chunk++;
    }
    // 조각 하나를 곱하는 동안 AHEAD개 뒤의 조각을 읽는다. now, from: 곱하고 있는 묶음과 chunk.
    template <class Input> __device__ __forceinline__ void run(const Input& input, typename S::Held& b,
                                                               const float* code, float* partial) {
        int now = 0, from = 0, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        float sum[SETS][4] = {};
        for (int base = 0; base < total; base += 2) {
            #pragma unroll
            for (int d = 0; d < 2; d++) {
                if (base + d >= total) break;
                const int s = d % S::AT_ONCE, piece = d % AHEAD;
                if (!S::ALL_HELD && s == 0 && now == 0) input.fill(b, from);
                if (S::segment(from, s) < S::SEGMENTS) pieces[piece].add(b[s], code, sum);
                if (base + d + AHEAD < total) load(piece, (d + AHEAD) % S::AT_ONCE);
                if (s < S::AT_ONCE - 1) continue;
// 묶음 하나의 제 칸을 다 곱했다
                float* target = partial + (now * S::ACROSS + warp) * CELLS;
                #pragma unroll
                for (int i = 0; i < SETS * 2; i++) {
                    float2* at = (float2*)(target + cell((lane >> 2) + i % 2 * 8, i / 2 * 8 + (lane & 3) * 2));
                    float2 value = {sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]};
                    // 둘째 chunk부터는 앞 chunk가 남긴 합에 더한다. 같은 스레드가 적은 자리라 동기화가 없어도 된다
                    if (from) value.x += at->x, value.y += at->y;
                    *at = value;
                    sum[i / 2][i % 2 * 2] = sum[i / 2][i % 2 * 2 + 1] = 0.f;
                }
                if (++now == count) now = 0, from++;
            }
        }
    }
};

// 공유 메모리: 표 TABLE_BYTES | 8비트 코드표 256 | LoRA의 d [3][RANK][LINES] | norm의 [WARPS][LINES] float2 | 합의 자리
// [LINE_SLOTS][WARPS][CELLS] | 행의 마무리 [LINE_SLOTS * ROWS][1 + RANK]. 자리는 decode_plan.py가 센다.
struct LineSpace {
    float* codes;
    float* down;
    float2* scratch;
    float* partial;
    float* ends;

    __device__ __forceinline__ LineSpace() {
        codes = (float*)(space_begin() + TABLE_BYTES);
        down = codes + (DOWN_AT - TABLE_BYTES) / 4;
        scratch = (float2*)(down + (LINE_SCRATCH_AT - DOWN_AT) / 4);
        partial = (float*)(scratch + (LINE_SUMS_AT - LINE_SCRATCH_AT) / 8);
        ends = partial + (LINE_ENDS_AT - LINE_SUMS_AT) / 4;
    }
    __device__ __forceinline__ void fill(const float* code) const {
        if (WEIGHT == NF4_WEIGHT) build_table<THREADS>((u32*)space_begin());
        if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    }
};

// LoRA의 아래쪽 곱 d[part][RANK][LINES] = A in. 블록마다 제 행이 쓰는 part만 스스로 센다. 합의 자리를 먼저 빌려 쓴다.
template <class S, int K> struct LineLora {
    typedef WideLines<ACT_BF16, K, LORA_TILE == 8, S::UNITS, S::SPREAD> T;
    LineProduct<T, S, OneMatrix, 1> product;
    const Matrix* a;
    int begin, end;  // 묶음의 번호

    // 기다리기 전에 부른다: A를 L2로 당긴다. 레지스터에 쥐고 기다리면 활성값의 자리가 모자란다.
    __device__ __forceinline__ void prime(const Matrix* matrix, int part_begin, int part_end) {
        a = matrix, begin = part_begin * LORA_TILES, end = part_end * LORA_TILES;
        product.set(a, begin, end - begin);
        product.prefetch_all();
    }
    template <class Input> __device__ __forceinline__ void run(const Input& input, typename S::Held& b, float adapter,
                                                               const LineSpace& space) {
        for (int from = begin; from < end; from += LINE_SLOTS) {
            int count = min(LINE_SLOTS, end - from);
            product.begin(a, from, count);
            product.run(input, b, space.codes, space.partial);
            __syncthreads();
            for (int e = threadIdx.x; e < count * LORA_TILE * LINES; e += THREADS) {
                int row = e % LORA_TILE, line = e / LORA_TILE % LINES, tile = e / LORA_TILE / LINES;
                // 묶음의 번호에서 어느 part의 몇째 rank인지를 얻는다. RANK를 LORA_TILE의 배수로 채운 행은 버린다
                int r = (from + tile) % LORA_TILES * LORA_TILE + row, part = (from + tile) / LORA_TILES;
                if (r < RANK)
                    space.down[(part * RANK + r) * LINES + line] =
                        S::sum(space.partial, tile, row, line) * adapter * (1.f / IN_SCALE);
            }
            __syncthreads();
        }
    }
};

// 출력 행들의 마무리에 쓸 bias와 LoRA의 B를 공유 메모리에 옮긴다. 기다리기 전에 불러 끝에서 기다리지 않는다.
//   ends: [행][1 + RANK], 행은 first부터 rows개.
__device__ __forceinline__ void load_ends(const Linear& linear, int first, int rows, float* ends) {
    for (int i = threadIdx.x; i < rows; i += THREADS)
        ends[i * (1 + RANK)] = linear.bias ? __ldg(linear.bias + first + i) : 0.f;
    if (!RANK || !linear.lora_b) return;
    for (int i = threadIdx.x; i < rows * RANK; i += THREADS)
        ends[i / RANK * (1 + RANK) + 1 + i % RANK] = __ldg(linear.lora_b + (size_t)first * RANK + i);
}

// 출력 하나의 마무리: 배율, bias, LoRA의 위쪽 곱. end: 이 행의 [1 + RANK]. down: 이 행이 든 행렬의 d [RANK][LINES],
// 어댑터가 없으면 널. row: 선형층 전체에서의 행.
__device__ __forceinline__ float finish_line(const Linear& linear, float sum, const float* end, const float* down,
                                             int row, int line) {
    float value = sum * (1.f / IN_SCALE);
    if (WEIGHT == INT8_WEIGHT) value *= __ldg(linear.row_scale + row);
    value += end[0];
    if (!down) return value;
    // W x + B (A x). B에는 배율(alpha / rank)이, A x(down)에는 어댑터를 켰는지가 곱해져 있다
    #pragma unroll 8
    for (int r = 0; r < RANK; r++) value += end[1 + r] * down[r * LINES + line];
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
            for (int line = 0; line < LINES; line++)
                sum[line] += now * act[i / ROWS * stride + cell(i % ROWS, line)];
        }
        float* target = lora.partial + ((size_t)block * RANK + r) * LINES;
        #pragma unroll
        for (int line = 0; line < LINES; line++) {
            float whole = warp_sum(sum[line]);
            if (lane == line) target[line] = again ? target[line] + whole : whole;
        }
    }
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

// 잔차를 읽어 norm하고 선형층 하나(또는 나란한 여럿)를 곱한다. `project_job`과 같은 것을 모든 줄에 한다.
template <bool MLP>
__device__ __forceinline__ void project_lines_job(const float* x, const Norm& norm, const Linear& linear,
                                                  const LoraOfAct& next_lora, const float* code, float adapter,
                                                  int block, int blocks, float* out, u16* act) {
    enum { PAIR = MLP && GATED ? 2 : 1, PARTS = MLP ? PAIR : QKV_PARTS, AT_ONCE = LINE_SLOTS / PAIR,
           UNITS = MLP ? FF / ROWS : (QDIM + 2 * KVDIM) / ROWS };
    typedef typename Choose<PARTS == 2, GateAndUp, OneMatrix>::Type OneOrTwo;
    typedef typename Choose<PARTS == 3, QkvMatrices, OneOrTwo>::Type Where;
    typedef LinePiece<HIDDEN> T;
    typedef Share<T, HIDDEN, 2> S;
// 1. 기다리기 전: 가중치와 LoRA의 A와 B를 미리 읽고 표를 만든다
    int first = UNITS * block / blocks, last = UNITS * (block + 1) / blocks, count = min(AT_ONCE, last - first);
    LineProduct<T, S, Where> product;
    product.begin(linear.part, first * PAIR, count * PAIR);
    bool adapted = RANK && linear.lora_a.weight && first < last;
    bool gives = MLP && RANK && next_lora.a;
    LineLora<S, HIDDEN> lora;
    if (adapted) lora.prime(&linear.lora_a, MLP ? 0 : Where::part(first), MLP ? PARTS : Where::part(last - 1) + 1);
    LineSpace space;
    float* up_ends = space.ends + AT_ONCE * ROWS * (1 + RANK);
    product.prefetch_all();
    load_ends(linear, first * ROWS, count * ROWS, space.ends);
    if (PAIR == 2) load_ends(linear, FF + first * ROWS, count * ROWS, up_ends);
    space.fill(code);
// 2. 잔차를 읽어 norm한다. LoRA의 아래쪽 곱도 여기서 센다
    wait_for_previous_kernel();
    NormedInput<S, HIDDEN, ACT_BF16, PRE_NORM> input = {x, norm, IN_SCALE};
    typename S::Held b;
    input.prepare(b, space.scratch);
    __syncthreads();  // 표가 다 만들어졌다
    if (adapted) lora.run(input, b, adapter, space);
    const float* down = adapted ? space.down : 0;
    // 합의 자리가 묶음 LINE_SLOTS개의 것이라, 맡은 묶음이 더 많으면 나누어 돈다
    for (int begin = first; begin < last; begin += AT_ONCE) {
        count = min(AT_ONCE, last - begin);
// 3. 곱한다
        product.run(input, b, space.codes, space.partial);
        __syncthreads();
        if (begin + count < last)
            product.begin(linear.part, (begin + count) * PAIR, min(AT_ONCE, last - begin - count) * PAIR);
// 4. 스레드 하나가 (행, 줄) 하나를 마무리한다. 이웃한 스레드는 이웃한 행이라 이어서 적는다
        for (int e = threadIdx.x; e < count * CELLS; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % LINES, unit = e / CELLS, row = (begin + unit) * ROWS + inside;
            const float* end = space.ends + (unit * ROWS + inside) * (1 + RANK);
            float value = S::sum(space.partial, unit * PAIR, inside, line);
            if (!MLP) {
                const float* mine = down ? down + Where::part(begin + unit) * RANK * LINES : 0;
                out[(size_t)line * (QDIM + 2 * KVDIM) + row] = finish_line(linear, value, end, mine, row, line);
                continue;
            }
            // gate와 up의 묶음이 번갈아 있다: gate의 합은 2 unit번째, up의 합은 2 unit + 1번째 자리에 있다
            value = activate(finish_line(linear, value, end, down, row, line));
            if (PAIR == 2)
                value *= finish_line(linear, S::sum(space.partial, unit * 2 + 1, inside, line),
                                     up_ends + (unit * ROWS + inside) * (1 + RANK), down ? down + RANK * LINES : 0,
                                     FF + row, line);
            u16* high = act + (size_t)line * FF + line_place(row);
            store_split<ACT_BF16>(high, high + (size_t)LINES * FF, value * IN_SCALE);
// 이 자리는 이 스레드만 읽었다. 다음 커널의 LoRA가 쓸 몫을 세려고 남긴다
            if (gives) space.partial[unit * PAIR * S::ACROSS * CELLS + cell(inside, line)] = value;
        }
        __syncthreads();
        if (gives) {
            give_lines(next_lora, space.partial, PAIR * S::ACROSS * CELLS, begin * ROWS, count * ROWS, block,
                       begin > first);
            __syncthreads();
        }
        if (begin + count >= last) break;
        int more = min(AT_ONCE, last - begin - count);
        load_ends(linear, (begin + count) * ROWS, more * ROWS, space.ends);
        if (PAIR == 2) load_ends(linear, FF + (begin + count) * ROWS, more * ROWS, up_ends);
    }
}

// qkv 또는 MLP의 앞쪽, 병렬 잔차면 둘 다. 앞의 qkv_blocks개 블록이 qkv를 맡는다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) project_lines(
    const float* x, Norm norm1, Linear qkv, Norm norm2, Linear mlp, LoraOfAct down_lora, const float* code,
    const float* adapter, int qkv_blocks, float* out, u16* act) {
    let_next_kernel_start();
    if ((int)blockIdx.x < qkv_blocks)
        project_lines_job<false>(x, norm1, qkv, down_lora, code, *adapter, blockIdx.x, qkv_blocks, out, act);
    else
        project_lines_job<true>(x, norm2, mlp, down_lora, code, *adapter, blockIdx.x - qkv_blocks,
                                gridDim.x - qkv_blocks, out, act);
}

// 잔차에 더하는 선형층. `contract_job`과 같은 것을 모든 줄에 한다. 병렬 잔차면 두 선형층을 함께 한다.
//   mlp_blocks: act를 만든 블록의 수. POST_NORM이면 더하지 않고 y에 적는다.
template <bool OUT, bool DOWN>
__device__ __forceinline__ void contract_lines_job(float* x, float* y, const u16* attended, const u16* act,
                                                   const float* code, float adapter, const Linear& out,
                                                   const Linear& down, const LoraOfAct& down_lora, int mlp_blocks) {
    enum { HALVES = WEIGHT == WIDE_WEIGHT ? 2 : 1, AT_ONCE = LINE_SLOTS / (OUT + DOWN), UNITS = HIDDEN / ROWS };
    typedef Share<LinePiece<QDIM>, QDIM, HALVES> OutShare;
    typedef Share<LinePiece<FF>, FF, HALVES, LINE_REGISTERS> DownShare;
// 1. 기다리기 전: 두 선형층의 가중치와 LoRA의 A와 B를 미리 읽는다
    int first = LINE_TILES(UNITS), last = (int)((u64)UNITS * (blockIdx.x + 1) / gridDim.x);
    int count = min(AT_ONCE, last - first);
    LineProduct<LinePiece<QDIM>, OutShare, OneMatrix> out_product;
    LineProduct<LinePiece<FF>, DownShare, OneMatrix> down_product;
    if (DOWN) down_product.begin(down.part, first, count);
    if (OUT) out_product.begin(out.part, first, count);
    bool out_adapted = OUT && RANK && out.lora_a.weight && first < last;
    bool down_adapted = DOWN && RANK && down_lora.a;
    LineLora<OutShare, QDIM> lora;
    if (out_adapted) lora.prime(&out.lora_a, 0, 1);
    LineSpace space;
    float *down_d = space.down + RANK * LINES, *down_ends = space.ends + (OUT ? AT_ONCE * ROWS * (1 + RANK) : 0);
    if (OUT) out_product.prefetch_all(), load_ends(out, first * ROWS, count * ROWS, space.ends);
    if (DOWN) down_product.prefetch_all(), load_ends(down, first * ROWS, count * ROWS, down_ends);
    space.fill(code);
    wait_for_previous_kernel();
    // attended는 줄마다 위와 아래가 이어져 있고, act는 모든 줄의 위 다음에 모든 줄의 아래가 있다
    SplitInput<OutShare> out_input = {attended, 2 * QDIM, QDIM};
    SplitInput<DownShare> down_input = {act, FF, LINES * FF};
    float* down_partial = space.partial + (OUT ? AT_ONCE * OutShare::ACROSS * CELLS : 0);
    LineTaker taker;
    if (down_adapted) taker.load(down_lora.partial, mlp_blocks);
    __syncthreads();
    for (int begin = first; begin < last; begin += AT_ONCE) {
        count = min(AT_ONCE, last - begin);
// 2. 곱한다
        if (OUT) {
            typename OutShare::Held b;
            if (OutShare::ALL_HELD) out_input.fill(b, 0);
            if (out_adapted && begin == first) lora.run(out_input, b, adapter, space);
            if (begin > first) out_product.begin(out.part, begin, count);
            out_product.run(out_input, b, space.codes, space.partial);
        }
        if (DOWN) {
            typename DownShare::Held b;
            if (DownShare::ALL_HELD) down_input.fill(b, 0);
            if (begin > first) down_product.begin(down.part, begin, count);
            down_product.run(down_input, b, space.codes, down_partial);
        }
        if (down_adapted && begin == first) taker.take(adapter, (float*)space.scratch, down_d);
        __syncthreads();
// 3. 줄과 행마다 스레드가 하나라 제자리에서 더한다
        for (int e = threadIdx.x; e < count * CELLS; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % LINES, unit = e / CELLS, row = (begin + unit) * ROWS + inside;
            int end = (unit * ROWS + inside) * (1 + RANK);
            float* target = (POST_NORM ? y : x) + (size_t)line * HIDDEN + row;
            float before = POST_NORM ? 0.f : __ldcg(target), sum = 0.f;
            if (OUT)
                sum += finish_line(out, OutShare::sum(space.partial, unit, inside, line), space.ends + end,
                                   out_adapted ? space.down : 0, row, line);
            if (DOWN)
                sum += finish_line(down, DownShare::sum(down_partial, unit, inside, line), down_ends + end,
                                   down_adapted ? down_d : 0, row, line);
            *target = POST_NORM ? sum : before + sum * RESIDUAL_SCALE;
        }
        __syncthreads();
        if (begin + count >= last) break;
        int more = min(AT_ONCE, last - begin - count);
        if (OUT) load_ends(out, (begin + count) * ROWS, more * ROWS, space.ends);
        if (DOWN) load_ends(down, (begin + count) * ROWS, more * ROWS, down_ends);
    }
}

#define CONTRACT_LINES(NAME, OUT, DOWN)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                     \
        float* x, float* y, const u16* attended, const u16* act, const float* code, const float* adapter, Linear out,  \
        Linear down, LoraOfAct down_lora, int mlp_blocks) {                                                            \
        let_next_kernel_start();                                                                                       \
        contract_lines_job<OUT, DOWN>(x, y, attended, act, code, *adapter, out, down, down_lora, mlp_blocks);          \
    }
#if PARALLEL
CONTRACT_LINES(contract_lines, true, true)
#else
CONTRACT_LINES(contract_attention_lines, true, false)
CONTRACT_LINES(contract_mlp_lines, false, true)
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
    product.begin(linear.part, first, min(LINE_SLOTS, last - first));
    LineSpace space;
    wait_for_previous_kernel();
    NormedInput<S, HIDDEN, BF16, true> input = {x, norm, 1.f};
    typename S::Held b;
    input.prepare(b, space.scratch);
    for (int begin = first; begin < last; begin += LINE_SLOTS) {
        int count = min(LINE_SLOTS, last - begin);
        // 출력 행렬은 늘 16비트라 NF4의 표와 절댓값의 코드가 필요 없다
        product.run(input, b, 0, space.partial);
        __syncthreads();
        if (begin + count < last) product.begin(linear.part, begin + count, min(LINE_SLOTS, last - begin - count));
        for (int e = threadIdx.x; e < count * CELLS; e += THREADS) {
            int inside = e % ROWS, line = e / ROWS % LINES, unit = e / CELLS, row = (begin + unit) * ROWS + inside;
            if (row >= VOCAB) continue;  // 16의 배수까지 채운 행은 적지 않는다
            float logit = S::sum(space.partial, unit, inside, line) * LOGIT_SCALE;
            if (LOGIT_CAP > 0.f) logit = LOGIT_CAP * tanhf(logit * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f)));
            logits[(size_t)line * LOGITS + row] = logit;
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
