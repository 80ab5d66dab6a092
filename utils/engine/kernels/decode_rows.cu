// 질문 LINES개에 함께 답하는 커널. 가중치를 한 번 읽어 모든 줄에 곱한다. 텐서 코어의 열 여덟이 줄 여덟이다.
// 줄이 하나일 때와 달리 norm과 LoRA의 아래쪽 곱은 따로 된 커널이 한 번만 센다. 활성값을 위와 아래 절반으로 나누는 것은 같아서
// 줄마다의 답이 하나씩 답한 것과 같다.
//   x, y: 잔차와 아직 더하지 않은 출력 fp32 [LINES][HIDDEN]
//   in: 선형층의 입력 16비트 [LINES][칸], 줄의 간격은 stride칸. IN_SCALE을 곱해 둔 것이다. 아래 절반은 low칸 뒤에 있다
//       (low가 0이면 없다)
//   d: LoRA의 아래쪽 곱 fp32 [LINES][part의 수 * RANK]. 어댑터가 꺼져 있으면 널

#define SETS (LINES / 8)

// 조각 하나(행 16개 x STEP칸)를 모든 줄과 곱해 sum에 더한다.
// sum[s]의 넷: (행 g, 줄 8s + 2t), (g, 8s + 2t + 1), (g + 8, 8s + 2t), (g + 8, 8s + 2t + 1). g = 레인 / 4, t = 레인 % 4.
template <bool BF, int K, bool HALF>
__device__ __forceinline__ void add_lines(const WidePiece<BF, K, HALF>& piece, const u16* in, int stride, int low,
                                          int segment, const u32*, const float*, float (&sum)[SETS][4]) {
// 텐서 코어의 열은 줄이고, 레인은 제 열의 활성값 네 조각 가운데 하나를 읽는다
    int line = threadIdx.x >> 2 & 7, quarter = threadIdx.x & 3;
    #pragma unroll
    for (int s = 0; s < SETS; s++) {
        const u16* source = in + (size_t)(s * 8 + line) * stride + segment * WIDE_K + quarter * 8;
        #pragma unroll 1
        for (int half = 0; half < (low ? 2 : 1); half++)
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                uint4 b = *(const uint4*)(source + half * low + u * 32);
                mma<BF>(sum[s], piece.top[u].x, piece.low[u].x, piece.top[u].y, piece.low[u].y, b.x, b.y);
                mma<BF>(sum[s], piece.top[u].z, piece.low[u].z, piece.top[u].w, piece.low[u].w, b.z, b.w);
            }
    }
}

template <int K>
__device__ __forceinline__ void add_lines(const Int8Piece<K>& piece, const u16* in, int stride, int low, int segment,
                                          const u32*, const float*, float (&sum)[SETS][4]) {
    int line = threadIdx.x >> 2 & 7, quarter = threadIdx.x & 3;
    u32 a[4] = {piece.top.x, piece.top.y, piece.top.z, piece.top.w};
    u32 d[4] = {piece.low.x, piece.low.y, piece.low.z, piece.low.w};
    #pragma unroll
    for (int s = 0; s < SETS; s++) {
        const u16* source = in + (size_t)(s * 8 + line) * stride + segment * INT8_K + quarter * 16;
        #pragma unroll
        for (int q = 0; q < 4; q++) {
            uint2 above = int8_to_fp16(a[q]), below = int8_to_fp16(d[q]);
            #pragma unroll 1
            for (int half = 0; half < (low ? 2 : 1); half++) {
                uint2 b = *(const uint2*)(source + half * low + q * 4);
                mma<false>(sum[s], above.x, below.x, above.y, below.y, b.x, b.y);
            }
        }
    }
}

// 절댓값 블록 둘을 따로 더해야 하므로 블록마다 다른 블록을 맡은 레인의 활성값을 0으로 두고 곱한다.
template <int K>
__device__ __forceinline__ void add_lines(const Nf4Piece<K>& piece, const u16* in, int stride, int low, int segment,
                                          const u32* table, const float* code, float (&sum)[SETS][4]) {
    int line = threadIdx.x >> 2 & 7, quarter = threadIdx.x & 3;
    u32 lane_bits = (threadIdx.x & 31) * 4;
    u32 a[4] = {piece.top.x, piece.top.y, piece.top.z, piece.top.w};
    u32 d[4] = {piece.low.x, piece.low.y, piece.low.z, piece.low.w};
    float2 above = Nf4Piece<K>::decode(piece.top_scale, code, piece.offset);
    float2 below = Nf4Piece<K>::decode(piece.low_scale, code, piece.offset);
// c[묶음 여덟 줄][절댓값 블록]: 블록마다 따로 더해야 절댓값을 합에 한 번만 곱한다
    float c[SETS][2][4] = {};
    #define PAIR(moved) (*(const u32*)((const char*)table + ((moved) & 0x7f80 | lane_bits)))
    #pragma unroll
    for (int q = 0; q < 4; q++) {
// 표에서 꺼낸 가중치는 모든 줄이 함께 쓴다. 줄이 하나일 때와 달리 꺼내는 값이 거의 들지 않는다
        u32 w[8] = {PAIR(a[q] << 7), PAIR(d[q] << 7), PAIR(a[q] >> 1), PAIR(d[q] >> 1),
                    PAIR(a[q] >> 9), PAIR(d[q] >> 9), PAIR(a[q] >> 17), PAIR(d[q] >> 17)};
        #pragma unroll
        for (int s = 0; s < SETS; s++) {
            const u16* source = in + (size_t)(s * 8 + line) * stride + segment * NF4_K + quarter * 32;
            #pragma unroll 1
            for (int half = 0; half < (low ? 2 : 1); half++) {
                uint4 b = *(const uint4*)(source + half * low + q * 8);
                #pragma unroll
                for (int block = 0; block < 2; block++) {
                    bool mine = quarter >> 1 == block;
                    mma<false>(c[s][block], w[0], w[1], w[2], w[3], mine ? b.x : 0, mine ? b.y : 0);
                    mma<false>(c[s][block], w[4], w[5], w[6], w[7], mine ? b.z : 0, mine ? b.w : 0);
                }
            }
        }
    }
    #undef PAIR
    #pragma unroll
    for (int s = 0; s < SETS; s++) {
        sum[s][0] += c[s][0][0] * above.x + c[s][1][0] * above.y;
        sum[s][1] += c[s][0][1] * above.x + c[s][1][1] * above.y;
        sum[s][2] += c[s][0][2] * below.x + c[s][1][2] * below.y;
        sum[s][3] += c[s][0][3] * below.x + c[s][1][3] * below.y;
    }
}

// 블록이 맡은 묶음 count개를 모든 줄과 곱해 partial[묶음][ACROSS][ROWS][LINES]에 적는다. 묶음마다 모든 워프가 칸을 나눈다.
template <class T, int K, class Where>
__device__ __forceinline__ void multiply_tiles(const Matrix* parts, int first, int count, const u16* in, int stride,
                                               int low, const u32* table, const float* code, float* partial) {
    enum { AHEAD = 2 };  // 더 미리 읽으면 레지스터가 모자라 느려진다
    typedef Product<T, K, AHEAD, Where> Tiles;
    enum { PER = Tiles::PER, ACROSS = Tiles::ACROSS };
    Tiles product(parts, first, count);
    product.prime();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, step = 0, segment = warp % ACROSS * PER;
// 워프마다의 합 [ROWS][LINES]를 적는 자리
    float* out = partial + (size_t)warp * ROWS * LINES;
    float sum[SETS][4] = {};
    for (int base = 0; base < product.count; base += AHEAD) {
        #pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            if (base + d >= product.count) break;
            add_lines(product.pieces[d], in, stride, low, segment + step, table, code, sum);
            if (base + d + AHEAD < product.count) product.load(d);
// 묶음 하나를 다 읽었다
            if (++step != PER) continue;
            step = 0;
            #pragma unroll
            for (int s = 0; s < SETS; s++) {
                float* target = out + (lane >> 2) * LINES + s * 8 + (lane & 3) * 2;
                target[0] = sum[s][0], target[1] = sum[s][1];
                target[8 * LINES] = sum[s][2], target[8 * LINES + 1] = sum[s][3];
                for (int i = 0; i < 4; i++) sum[s][i] = 0.f;
            }
            out += WARPS * ROWS * LINES;
        }
    }
}

enum Use { TO_QKV, TO_ACT, TO_RESIDUAL, TO_LOGITS };

// 선형층 하나를 모든 줄에 곱하고 쓰임에 맞게 적는다. 블록은 묶음 LINE_SLOTS개씩 돈다.
template <Use USE, class T, int K, class Where, int PAIR>
__device__ __forceinline__ void multiply(const Linear& linear, const u16* in, int stride, int low, const float* d,
                                         int parts, int units, const float* code, void* out) {
    u32* table = (u32*)shared;
    float* codes = (float*)(shared + TABLE_BYTES);
    float* partial = codes + 256;
    if (USE != TO_LOGITS && WEIGHT == NF4_WEIGHT) build_table(table);
    if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = __ldg(code + threadIdx.x);
    __syncthreads();
// 워프 ACROSS개가 묶음 하나를 나누고, 한 번에 AT_ONCE단위의 합을 공유 메모리에 둔다
    enum { ACROSS = Product<T, K, 2, Where>::ACROSS, GROUPS = WARPS / ACROSS, AT_ONCE = LINE_SLOTS / PAIR };
// 단위는 출력 ROWS행이다. gate와 up은 두 묶음이 한 단위다
    int first = (int)((u64)units * blockIdx.x / gridDim.x), last = (int)((u64)units * (blockIdx.x + 1) / gridDim.x);
    for (int begin = first; begin < last; begin += AT_ONCE) {
        int count = min(AT_ONCE, last - begin);
        multiply_tiles<T, K, Where>(linear.part, begin * PAIR, count * PAIR, in, stride, low, table, codes, partial);
        __syncthreads();
// 스레드 하나가 (행, 줄) 하나를 마무리한다. 이웃한 스레드는 이웃한 줄이라 partial을 이어서 읽는다
        for (int e = threadIdx.x; e < count * ROWS * LINES; e += THREADS) {
            int line = e % LINES, inside = e / LINES % ROWS, unit = e / LINES / ROWS;
            int row = (begin + unit) * ROWS + inside;
            float value[PAIR];
            #pragma unroll
            for (int p = 0; p < PAIR; p++) {
// whole: 나란한 행렬들을 이어 붙였을 때의 행. bias와 LoRA의 B가 그 차례로 놓여 있다
                int tile = unit * PAIR + p, whole = p * FF + row;
                float sum = 0.f;
                // 워프 ACROSS개가 묶음 하나를 나누고, 묶음 GROUPS개가 나란히 간다
                const float* source = partial + (tile / GROUPS * WARPS + tile % GROUPS * ACROSS) * ROWS * LINES;
                for (int a = 0; a < ACROSS; a++) sum += source[(a * ROWS + inside) * LINES + line];
                if (USE != TO_LOGITS) sum *= 1.f / IN_SCALE;
                if (USE != TO_LOGITS && WEIGHT == INT8_WEIGHT) sum *= __ldg(linear.row_scale + whole);
                if (linear.bias) sum += __ldg(linear.bias + whole);
                int part = PAIR == 2 ? p : Where::part(row / ROWS);
                const float *up = linear.lora_b + (size_t)whole * RANK, *down = d + (line * parts + part) * RANK;
                if (d)
                    for (int r = 0; r < RANK; r++) sum += __ldg(up + r) * down[r];
                value[p] = sum;
            }
// 쓰임은 컴파일할 때 정해진다
            if (USE == TO_QKV) ((float*)out)[(size_t)line * (QDIM + 2 * KVDIM) + row] = value[0];
            if (USE == TO_ACT) {
                u16* high = (u16*)out + (size_t)line * FF + row;
                float gated = activate(value[0]) * (PAIR == 2 ? value[PAIR - 1] : 1.f);
                store_split<ACT_BF16>(high, high + (size_t)LINES * FF, gated * IN_SCALE);
            }
// 줄과 행마다 스레드가 하나라 제자리에서 더한다
            if (USE == TO_RESIDUAL) {
                float* target = (float*)out + (size_t)line * HIDDEN + row;
                *target = POST_NORM ? value[0] : *target + value[0] * RESIDUAL_SCALE;
            }
// 16의 배수까지 채운 행은 적지 않는다
            if (USE == TO_LOGITS && row < VOCAB) {
                float logit = value[0] * LOGIT_SCALE;
                if (LOGIT_CAP > 0.f) logit = LOGIT_CAP * tanhf(logit * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f)));
                ((float*)out)[(size_t)line * VOCAB + row] = logit;
            }
        }
        __syncthreads();
    }
}

#define LINES_KERNEL(NAME, USE, T, K, WHERE, PAIR, UNITS)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Linear linear, const u16* in, int stride, int low,   \
                                                                  const float* d, int parts, const float* code,        \
                                                                  void* out) {                                         \
        multiply<USE, T, K, WHERE, PAIR>(linear, in, stride, low, d, parts, UNITS, code, out);                         \
    }
#if QKV_PARTS == 3
LINES_KERNEL(qkv_lines, TO_QKV, Piece<HIDDEN>, HIDDEN, QkvMatrices, 1, (QDIM + 2 * KVDIM) / ROWS)
#else
LINES_KERNEL(qkv_lines, TO_QKV, Piece<HIDDEN>, HIDDEN, OneMatrix, 1, (QDIM + 2 * KVDIM) / ROWS)
#endif
#if GATED
LINES_KERNEL(mlp_lines, TO_ACT, Piece<HIDDEN>, HIDDEN, GateAndUp, 2, FF / ROWS)
#else
LINES_KERNEL(mlp_lines, TO_ACT, Piece<HIDDEN>, HIDDEN, OneMatrix, 1, FF / ROWS)
#endif
LINES_KERNEL(out_lines, TO_RESIDUAL, Piece<QDIM>, QDIM, OneMatrix, 1, HIDDEN / ROWS)
LINES_KERNEL(down_lines, TO_RESIDUAL, Piece<FF>, FF, OneMatrix, 1, HIDDEN / ROWS)
typedef WidePiece<BF16, HIDDEN> HeadPiece;
LINES_KERNEL(head_lines, TO_LOGITS, HeadPiece, HIDDEN, OneMatrix, 1, (VOCAB + ROWS - 1) / ROWS)

// LoRA의 아래쪽 곱 d = A in. grid (part의 수 * RANK), 블록 256. a: fp32 [grid.x][columns]. 스레드 하나가 8칸씩 맡는다.
extern "C" __global__ void __launch_bounds__(256) lora_lines(const float* a, const u16* in, int stride, int low,
                                                             int columns, float* d) {
    __shared__ float sums[8][LINES];
    float sum[LINES] = {};
// A의 한 행과 모든 줄의 곱을 함께 센다. A를 한 번만 읽는다
    for (int i = threadIdx.x * 8; i < columns; i += 256 * 8) {
        float weight[8];
        for (int j = 0; j < 8; j++) weight[j] = __ldg(a + (size_t)blockIdx.x * columns + i + j);
        #pragma unroll
        for (int line = 0; line < LINES; line++)
            #pragma unroll 1
            for (int half = 0; half < (low ? 2 : 1); half++) {
                uint4 packed = *(const uint4*)(in + (size_t)line * stride + half * low + i);
                u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
                #pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[line] += weight[2 * j] * widen<ACT_BF16>((u16)words[j]) +
                                 weight[2 * j + 1] * widen<ACT_BF16>((u16)(words[j] >> 16));
            }
    }
    #pragma unroll
    for (int line = 0; line < LINES; line++) {
        float whole = warp_sum(sum[line]);
        if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5][line] = whole;
    }
    __syncthreads();
// d의 모양은 [LINES][part의 수 * RANK]다
    if (threadIdx.x >= LINES) return;
    float whole = 0.f;
    for (int w = 0; w < 8; w++) whole += sums[w][threadIdx.x];
    d[threadIdx.x * gridDim.x + blockIdx.x] = whole * (1.f / IN_SCALE);
}

// 줄마다의 norm. grid (LINES). 아직 더하지 않은 출력 y가 있으면 그 norm을 걸어 x에 더한 뒤에 한다.
//   out: 16비트 [위, 아래][LINES][HIDDEN]. to_head면 출력 행렬의 입력이라 dtype이 모델의 것이고 배율을 곱하지 않는다.
extern "C" __global__ void __launch_bounds__(THREADS) norm_lines(float* x, const float* y, const float* post, Norm norm,
                                                                 int to_head, u16* out) {
// 두 norm이 scratch의 다른 절반을 쓴다
    __shared__ float2 scratch[2 * WARPS];
    size_t at = (size_t)blockIdx.x * HIDDEN;
    Row row;
    row.load(x + at);
// 앞 선형층의 출력에 거는 norm. 줄마다 블록이 하나라 x를 제자리에서 고쳐도 된다
    if (y) {
        Row more, weight;
        more.load(y + at), weight.load_constant(post);
        float factor = moments(more, scratch).y;
        for (int j = 0; j < PER_THREAD; j++) {
            int i = threadIdx.x + j * THREADS;
            row.v[j] += more.v[j] * factor * weight.v[j];
            if (i < HIDDEN) x[at + i] = row.v[j];
        }
    }
// norm이 없는 구조(출력에만 거는 EXAONE 4)는 잔차를 그대로 입력으로 쓴다
    float2 moment = norm.weight ? moments(row, scratch + WARPS) : float2{0.f, 1.f};
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= HIDDEN) continue;
        float value = norm.weight ? (row.v[j] - moment.x) * moment.y * __ldg(norm.weight + i) : row.v[j];
        if (norm.bias) value += __ldg(norm.bias + i);
        u16 *high = out + at + i, *low = high + LINES * HIDDEN;
        if (to_head) store_split<BF16>(high, low, value);
        else store_split<ACT_BF16>(high, low, value * IN_SCALE);
    }
}
