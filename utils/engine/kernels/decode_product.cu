// 행렬과 벡터의 곱. 가중치를 한 번만, 끊기지 않게 읽고 텐서 코어로 더한다.

// ROWS(16)는 텐서 코어 하나의 높이다. 행렬의 행을 이만큼씩 묶어 묶음(tile)이라 부른다.
// 한 번에 16비트와 int8 가중치는 64칸, NF4는 128칸(절댓값 블록 둘)을 읽는다.
#define WIDE_K 64
#define INT8_K 64
#define NF4_K 128

extern __shared__ char shared[];

// 커널이 함께 쓰는 공유 메모리(표와 합의 자리)의 시작. 앞에는 드라이버와 컴파일러가 쓰는 자리가 있다.
__device__ __forceinline__ char* space_begin() { return shared + (SPACE_AT - shared_address(shared)); }

__constant__ float NF4_CODE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// NF4 바이트 하나(가중치 둘)를 fp16 둘로 바꾸는 표. 레인마다 사본을 두어 은행 충돌이 없다. 한 줄은 32개(128바이트)이고,
// 공유 메모리가 넉넉하면 줄의 간격(TABLE_STEP)이 256바이트라서 명령 하나로 줄을 찾는다. 표는 공유 메모리의 주소 SPACE_AT에 있다:
// 주소가 상수라서 찾은 줄에 더하지 않고 읽는다.
template <int N> __device__ __forceinline__ void build_table(u32* table) {
    for (int i = threadIdx.x; i < 256 * 8; i += N) {
        u32 pair = narrow<false>(NF4_CODE[i >> 7]) | (u32)narrow<false>(NF4_CODE[i >> 3 & 15]) << 16;
        ((uint4*)table)[i / 8 * (TABLE_STEP / 16) + i % 8] = {pair, pair, pair, pair};
    }
}

// word의 byte번째 바이트에 든 가중치 둘. lane_bytes는 레인의 번호 x 4다.
template <int BYTE> __device__ __forceinline__ u32 pair_at(u32 word, u32 lane_bytes) {
    return shared_word<SPACE_AT>(TABLE_STEP == 256 ? byte_above<BYTE>(word, lane_bytes)
                                                   : (BYTE ? word >> (BYTE * 8 - 7) : word << 7) & 0x7f80 | lane_bytes);
}

// 행렬 하나. 16비트와 int8 가중치면 weight만 쓴다. scale: 64칸마다의 절댓값(이중 양자화면 8비트), group: 그 절댓값의
// 절댓값. decode_weights.py의 `MatrixArgument`와 같은 차례다.
struct Matrix {
    const u8* weight;
    const void* scale;
    const float* group;
    float offset;
};

// 선형층 하나. 나란히 곱하는 행렬(q, k, v나 gate, up)을 part에 담는다. `LinearArgument`와 같은 차례다.
//   bias, row_scale: fp32 [전체 행]. 없으면 널. row_scale은 int8 가중치의 행마다의 배율이다.
//   lora_a: 16비트 [part의 수][LORA_ROWS][입력]의 행렬 하나. 없으면 weight가 널이다.
//   lora_b: fp32 [전체 행][RANK].
struct Linear {
    Matrix part[3];
    Matrix lora_a;
    const float* bias;
    const float* row_scale;
    const float* lora_b;
};

// 공유 메모리에 둔 것들. 활성값 [칸]은 위, 아래 절반으로 나누어 둔다(low가 없으면 위 절반뿐이다).
struct Inputs {
    const u16* high;
    const u16* low;
    const float* code;
};

// 조각(행 16개 x STEP칸) 하나. 레인은 행 lane/4와 그 아래 여덟째 행의 16바이트씩을 맡는다.
// 텐서 코어의 열 여덟 가운데 몇만 쓴다. 16비트 가중치에서는 열 0이 활성값의 위 절반, 열 1이 아래 절반이다.
// HALF면 묶음의 높이가 8행이다(아래 여덟 행은 0으로 여긴다).
template <bool BF, int K, bool HALF = false> struct WidePiece {
    enum { STEP = WIDE_K, ROW_BYTES = K * 2, STEP_BYTES = STEP * 2, QUADS = 2, HEIGHT = HALF ? 8 : ROWS };
    uint4 top[2], low[2];

    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 16;
        for (int u = 0; u < 2; u++) top[u] = load_weight(source + u * 64);
        for (int u = 0; u < 2; u++) {
            low[u] = {0, 0, 0, 0};
            if (!HALF) low[u] = load_weight(source + 8 * ROW_BYTES + u * 64);
        }
    }

    __device__ __forceinline__ static void input(const Inputs& in, int segment, uint4 (&b)[QUADS]) {
        int column = threadIdx.x >> 2 & 7;
        const u16* source = (column ? in.low : in.high) + segment * STEP + (threadIdx.x & 3) * 8;
        for (int u = 0; u < 2; u++) {
            b[u] = {0, 0, 0, 0};
            if (column < (in.low ? 2 : 1)) b[u] = *(const uint4*)(source + u * 32);
        }
    }

    __device__ __forceinline__ void add(const Inputs&, const uint4 (&b)[QUADS], float& upper, float& lower) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        for (int u = 0; u < 2; u++) {
            mma<BF>(c, top[u].x, low[u].x, top[u].y, low[u].y, b[u].x, b[u].y);
            mma<BF>(c, top[u].z, low[u].z, top[u].w, low[u].w, b[u].z, b[u].w);
        }
        upper += c[0] + c[1];
        lower += c[2] + c[3];
    }
};

template <int K> struct Nf4Piece {
    enum { STEP = NF4_K, ROW_BYTES = K / 2, STEP_BYTES = STEP / 2, QUADS = 4, HEIGHT = ROWS };
    uint4 top, low;
    float offset;
    float2 top_scale, low_scale;  // 이중 양자화면 x에 8비트 절댓값 둘, y에 그 묶음의 절댓값

    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 16;
        top = load_weight(source);
        low = load_weight(source + 8 * ROW_BYTES);
        offset = m.offset;
#if DOUBLE_QUANT
        const u8* scale = (const u8*)m.scale + (at >> 5);
        top_scale = {__uint_as_float(__ldg((const u16*)scale)), __ldg(m.group + (at >> 13))};
        low_scale = {__uint_as_float(__ldg((const u16*)(scale + ROW_BYTES / 4))),
                     __ldg(m.group + (at + 8 * ROW_BYTES >> 13))};
#else
        const float2* scale = (const float2*)m.scale + (at >> 6);
        top_scale = __ldg(scale);
        low_scale = __ldg(scale + ROW_BYTES / 8);
#endif
    }

    // 바이트 하나에 가중치가 둘이고 위의 네 비트가 앞의 칸이다. 한 레인의 32칸은 절댓값 블록 하나에 든다. 블록마다 열을 달리하면(열 0, 1은 위 절반, 2, 3은 아래 절반) 블록별
    // 합이 따로 나오므로 절댓값은 합에 한 번만 곱한다.
    __device__ __forceinline__ static void input(const Inputs& in, int segment, uint4 (&b)[QUADS]) {
        int column = threadIdx.x >> 2 & 7, quarter = threadIdx.x & 3;
        bool mine = column < (in.low ? 4 : 2) && (column & 1) == quarter >> 1;
        const u16* source = (column & 2 ? in.low : in.high) + segment * STEP + quarter * 32;
        for (int q = 0; q < QUADS; q++) {
            b[q] = {0, 0, 0, 0};
            if (mine) b[q] = *(const uint4*)(source + q * 8);
        }
    }

    __device__ __forceinline__ static float2 decode(float2 scale, const float* code, float offset) {
#if DOUBLE_QUANT
        u32 pair = __float_as_uint(scale.x);
        return {code[pair & 255] * scale.y + offset, code[pair >> 8] * scale.y + offset};
#else
        return scale;
#endif
    }

    __device__ __forceinline__ void add(const Inputs& in, const uint4 (&b)[QUADS], float& upper, float& lower) {
        u32 lane = (threadIdx.x & 31) * 4;
        u32 a[4] = {top.x, top.y, top.z, top.w}, d[4] = {low.x, low.y, low.z, low.w};
        float c[2][4] = {};
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            mma<false>(c[0], pair_at<0>(a[q], lane), pair_at<0>(d[q], lane), pair_at<1>(a[q], lane),
                       pair_at<1>(d[q], lane), b[q].x, b[q].y);
            mma<false>(c[1], pair_at<2>(a[q], lane), pair_at<2>(d[q], lane), pair_at<3>(a[q], lane),
                       pair_at<3>(d[q], lane), b[q].z, b[q].w);
        }
        float2 s = decode(top_scale, in.code, offset), z = decode(low_scale, in.code, offset);
        upper += (c[0][0] + c[1][0]) * s.x + (c[0][1] + c[1][1]) * s.y;
        lower += (c[0][2] + c[1][2]) * z.x + (c[0][3] + c[1][3]) * z.y;
    }
};

// int8: 한 레인이 행의 이어진 16칸을 맡는다. 열 0이 활성값의 위 절반, 열 1이 아래 절반이다(모두 fp16). 행마다의 배율은
// 다 더한 뒤에 곱한다.
template <int K> struct Int8Piece {
    enum { STEP = INT8_K, ROW_BYTES = K, STEP_BYTES = STEP, QUADS = 2, HEIGHT = ROWS };
    uint4 top, low;

    __device__ __forceinline__ void load(const Matrix& m, u32 at) {
        const u8* source = m.weight + at + (threadIdx.x & 3) * 16;
        top = load_weight(source);
        low = load_weight(source + 8 * ROW_BYTES);
    }

    __device__ __forceinline__ static void input(const Inputs& in, int segment, uint4 (&b)[QUADS]) {
        int column = threadIdx.x >> 2 & 7;
        const u16* source = (column ? in.low : in.high) + segment * STEP + (threadIdx.x & 3) * 16;
        for (int u = 0; u < 2; u++) {
            b[u] = {0, 0, 0, 0};
            if (column < (in.low ? 2 : 1)) b[u] = *(const uint4*)(source + u * 8);
        }
    }

    __device__ __forceinline__ void add(const Inputs&, const uint4 (&b)[QUADS], float& upper, float& lower) {
        u32 a[4] = {top.x, top.y, top.z, top.w}, d[4] = {low.x, low.y, low.z, low.w};
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            uint2 above = int8_to_fp16(a[q]), below = int8_to_fp16(d[q]);
            const uint4& values = b[q >> 1];
            mma<false>(c, above.x, below.x, above.y, below.y, q & 1 ? values.z : values.x, q & 1 ? values.w : values.y);
        }
        upper += c[0] + c[1];
        lower += c[2] + c[3];
    }
};

#if WEIGHT == NF4_WEIGHT
template <int K> using Piece = Nf4Piece<K>;
#elif WEIGHT == INT8_WEIGHT
template <int K> using Piece = Int8Piece<K>;
#else
template <int K> using Piece = WidePiece<BF16, K>;
#endif

// 묶음의 번호를 (행렬, 그 안의 묶음)으로 바꾼다.
// 한 행렬, q | k | v처럼 이어 놓은 행렬, gate와 up을 번갈아 놓은 행렬의 세 가지다.
struct OneMatrix {
    __device__ __forceinline__ static int part(int) { return 0; }
    __device__ __forceinline__ static int tile(int tile) { return tile; }
};
struct QkvMatrices {
    enum { KEYS = QDIM / ROWS, VALUES = (QDIM + KVDIM) / ROWS };
    __device__ __forceinline__ static int part(int tile) { return (tile >= KEYS) + (tile >= VALUES); }
    __device__ __forceinline__ static int tile(int tile) {
        return tile - (tile >= VALUES ? VALUES : tile >= KEYS ? KEYS : 0);
    }
};
struct GateAndUp {
    __device__ __forceinline__ static int part(int tile) { return tile & 1; }
    __device__ __forceinline__ static int tile(int tile) { return tile >> 1; }
};

// 조각 segments개로 된 묶음 하나를 워프 across개가 나누어 맡을 때, 묶음 tiles개인 블록에서 워프 하나가 지나는 조각의 수.
__device__ constexpr int share_of(int segments, int tiles, int across) {
    return (tiles + WARPS / across - 1) / (WARPS / across) * ((segments + across - 1) / across);
}
// 그것이 가장 적은 across. 같으면 큰 것이다.
__device__ constexpr int split_across(int segments, int tiles) {
    int best = 1;
    for (int across = 2; across <= WARPS && across <= segments; across++)
        if (share_of(segments, tiles, across) <= share_of(segments, tiles, best)) best = across;
    return best;
}

// 블록이 맡은 묶음들과 활성값의 곱. 워프 ACROSS개가 한 묶음의 칸을 나누어 맡고, 워프마다의 합을
// partial[묶음][ACROSS][16]에 적는다. 도는 동안 블록의 동기화가 없어 읽기가 끊기지 않는다.
// 조각이 ACROSS로 나누어떨어지지 않으면(EVEN이 아니면) 끝의 워프가 적게 맡고, 남는 워프는 쉰다.
//   T: 가중치의 꼴, K: 칸의 수, TILES: 블록의 묶음의 최대 수, AHEAD: 미리 읽는 조각의 수, Where: 묶음이 든 행렬을 찾는 법.
template <class T, int K, int TILES, int AHEAD, class Where = OneMatrix> struct Product {
    enum { SEGMENTS = K / T::STEP, ACROSS = split_across(SEGMENTS, TILES), PER = (SEGMENTS + ACROSS - 1) / ACROSS,
           GROUPS = WARPS / ACROSS, EVEN = SEGMENTS % ACROSS == 0, STATIC = EVEN && AHEAD % PER == 0,
           HELD = STATIC && PER * T::QUADS <= 8, FLOATS = ACROSS * ROWS };
    T pieces[AHEAD];
    const Matrix* parts;
    Matrix matrix;
    u32 at;
    int tile, count, next;

    __device__ __forceinline__ Product(const Matrix* parts, int first_tile, int tiles) : parts(parts), next(0) {
        int group = (threadIdx.x >> 5) / ACROSS;
        bool works = WARPS % ACROSS == 0 || group < GROUPS;
        count = works && tiles > group ? ((tiles - group - 1) / GROUPS + 1) * per() : 0;
        tile = first_tile + group;
        find();
    }

    // 이 워프가 묶음마다 맡는 조각의 수.
    __device__ __forceinline__ static int per() {
        return EVEN ? PER : max(0, min((int)PER, SEGMENTS - (int)(threadIdx.x >> 5) % ACROSS * PER));
    }

    // 지금 묶음의 행렬과, 이 레인이 읽을 자리(바이트).
    __device__ __forceinline__ void find() {
        int part = Where::part(tile);
        matrix = parts[0];
        if (part == 1) matrix = parts[1];
        if (part == 2) matrix = parts[2];
        at = (Where::tile(tile) * T::HEIGHT + (threadIdx.x >> 2 & 7)) * T::ROW_BYTES +
             (threadIdx.x >> 5) % ACROSS * PER * T::STEP_BYTES;
    }

    __device__ __forceinline__ void load(int d) {
        pieces[d].load(matrix, at);
        at += T::STEP_BYTES;
        bool wrap = STATIC ? d % PER == PER - 1 : ++next == per();
// 묶음 하나를 다 읽으면 이 워프의 다음 묶음으로 간다
        if (wrap) tile += GROUPS, next = 0, find();
    }

    __device__ __forceinline__ void prime() {
        #pragma unroll
        for (int d = 0; d < AHEAD; d++)
            if (d < count) load(d);
    }

    __device__ __forceinline__ void run(const Inputs& in, float* partial) {
// 활성값의 조각 b는 묶음이 바뀌어도 같다. 워프가 맡은 칸이 좁으면(HELD) 레지스터에 쥐고 있는다
        int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = warp % ACROSS * PER, step = 0;
        float upper = 0.f, lower = 0.f;
        float* out = partial + (warp / ACROSS * ACROSS + warp % ACROSS) * ROWS + (lane >> 2);
        uint4 held[HELD ? PER : 1][T::QUADS];
        if (HELD)
            #pragma unroll
            for (int s = 0; s < PER; s++) T::input(in, first + s, held[s]);
        for (int base = 0; base < count; base += AHEAD) {
            #pragma unroll
            for (int d = 0; d < AHEAD; d++) {
                if (base + d >= count) break;
                if (!HELD) T::input(in, first + (STATIC ? d % PER : step), held[0]);
                pieces[d].add(in, held[HELD ? d % PER : 0], upper, lower);
                if (base + d + AHEAD < count) load(d);
                if (STATIC ? d % PER != PER - 1 : ++step != per()) continue;
                step = 0;
// 레인 4g의 열 0, 1(위와 아래 절반)과 레인 4g + 1의 열 2, 3을 더하면 행 g의 합이다
                upper += __shfl_xor_sync(~0u, upper, 1);
                lower += __shfl_xor_sync(~0u, lower, 1);
                if ((lane & 3) == 0) out[0] = upper, out[8] = lower;
                out += GROUPS * ACROSS * ROWS;
                upper = lower = 0.f;
            }
        }
    }

// 블록이 맡은 row번째 출력 행의 합. 더하는 차례가 정해져 있어 답은 늘 같다.
    __device__ __forceinline__ static float row(const float* partial, int row) {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < ACROSS; i++) sum += partial[(row / ROWS * ACROSS + i) * ROWS + row % ROWS];
        return sum;
    }
};

// LoRA의 아래쪽 곱 d = A x. 블록마다 A 전체(또는 제 출력 행이 쓰는 부분)를 읽어 스스로 센다. 블록끼리 나누어 세고
// 기다리는 것보다 빠르다: A는 작고(r 8, 칸 2,048이면 32 KB) 앞 커널과 상관이 없어 기다리는 동안 미리 읽는다.
// A의 행은 part마다 LORA_TILE(8 또는 16)의 배수로 채워져 있다. 입력이 아주 넓은 MLP의 뒤쪽 행렬만은 다르게 센다
// (decode.cu의 `LoraOfAct`).
#define LORA_TILES (LORA_ROWS / LORA_TILE)  // part 하나의 묶음 수
template <int K> using LoraDown = Product<WidePiece<ACT_BF16, K, LORA_TILE == 8>, K, LORA_TILES, 2>;

// part 하나의 d [RANK]를 공유 메모리에 모은다. partial은 그 part의 첫 묶음의 자리다. 앞뒤로 동기화해야 한다.
template <int K> __device__ __forceinline__ void gather_lora(const float* partial, float adapter, float* down) {
    #pragma unroll 1
    for (int r = threadIdx.x; r < RANK; r += THREADS)
        down[r] = LoraDown<K>::row(partial, r / LORA_TILE * ROWS + r % LORA_TILE) * adapter * (1.f / IN_SCALE);
}

// 출력 행 하나의 마무리: 배율, bias, LoRA의 위쪽 곱 B d. 앞 커널을 기다리기 전에 읽어 두어 끝에서 기다리지 않는다.
struct RowEnd {
    enum { HELD = RANK <= 16 ? RANK : 0 };  // r이 크면 B는 L2에만 당겨 둔다
    float scale, bias, b[HELD ? HELD : 1];

    __device__ __forceinline__ void load(const Linear& linear, int row, bool adapted) {
        scale = WEIGHT == INT8_WEIGHT ? __ldg(linear.row_scale + row) * (1.f / IN_SCALE) : 1.f / IN_SCALE;
        bias = linear.bias ? __ldg(linear.bias + row) : 0.f;
        if (!adapted) return;
        const float* source = linear.lora_b + (size_t)row * RANK;
        if (!HELD) prefetch(source);
        #pragma unroll
        for (int r = 0; r < HELD; r++) b[HELD ? r : 0] = __ldg(source + r);
    }

    // down: 이 행이 든 행렬의 d [RANK]. 어댑터가 꺼져 있으면 널. row: 선형층 전체에서의 행.
    __device__ __forceinline__ float finish(const Linear& linear, float sum, const float* down, int row) const {
        float value = sum * scale + bias;
        if (!down) return value;
        #pragma unroll
        for (int r = 0; r < HELD; r++) value += b[HELD ? r : 0] * down[r];
        if (!HELD)
            for (int r = 0; r < RANK; r++) value += __ldg(linear.lora_b + (size_t)row * RANK + r) * down[r];
        return value;
    }
};
