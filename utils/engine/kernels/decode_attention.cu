// 토큰 하나의 attention: q/k norm, rotary, int8 KV cache, softmax. 질문을 읽는 커널과 함께 쓰는 것도 여기에 있다.
//
// KV cache는 PAGE개의 위치마다 메모리 한 쪽(page)이다. 대화가 길어지면 쪽을 더할 뿐 옮기지 않으므로 graph를 다시
// 캡처하지 않는다. 쪽 하나에는 모든 층의 것이 있다(kv_cache.py의 `PageLayout`이 자리를 정한다):
//   값    int8  [K, V][층][KV 머리][PAGE][HEAD_DIM]
//   배율  fp16  [K, V][층][KV 머리][PAGE][HEAD_DIM / GROUP]     값 = int8 * 배율
//   회전  float2 [rotary의 종류][PAGE][ROTARY / 2]              위치마다의 (cos, sin)

#define LANE 16  // 레인 하나가 맡는 칸
#define PER_KV (HEADS / KV_HEADS)
#define KV_VECTORS (2 * LAYERS * KV_HEADS)

// 한 층의 attention이 쓰는 상수. `AttentionArgument`와 같은 차례다.
struct Attention {
    int layer;
    int window;  // 이 위치 수보다 먼 것은 보지 않는다. 0이면 모두 본다
    int turn;    // 쓸 rotary의 종류. 음수면 돌리지 않는다
    const float* q_norm;  // fp32 [HEAD_DIM]. norm이 없으면 널
    const float* k_norm;
};

struct Page {
    u8* bytes;
    int slot;  // 쪽 안의 자리

    __device__ __forceinline__ Page(u8* bytes, int slot) : bytes(bytes), slot(slot) {}
    __device__ __forceinline__ Page(u8* const* pages, int position)
        : bytes((u8*)__ldg((const u64*)pages + position / PAGE)), slot(position % PAGE) {}

    // kind 0은 K, 1은 V.
    __device__ __forceinline__ static u32 vector(int kind, int layer, int head) {
        return (kind * LAYERS + layer) * KV_HEADS + head;
    }
    __device__ __forceinline__ signed char* values(int kind, int layer, int head) const {
        return (signed char*)bytes + (vector(kind, layer, head) * PAGE + slot) * HEAD_DIM;
    }
    __device__ __forceinline__ u16* scales(int kind, int layer, int head) const {
        return (u16*)(bytes + PAGE_SCALES) + (vector(kind, layer, head) * PAGE + slot) * (HEAD_DIM / GROUP);
    }
    __device__ __forceinline__ const float2* turns(int kind) const {
        return (const float2*)(bytes + PAGE_TURNS) + (kind * PAGE + slot) * (ROTARY / 2);
    }
};

// d번째 칸의 (cos, sin). 돌리지 않는 칸이면 (1, 0)이다.
__device__ __forceinline__ float2 turn_of(const float2* turns, int d) {
    return turns && d < ROTARY ? __ldg(turns + d % (ROTARY / 2)) : float2{1.f, 0.f};
}

// 머리 하나의 d번째 칸을 돌린다. 앞 절반과 뒤 절반이 짝이다.
__device__ __forceinline__ float rotate(const float* head, float2 turn, int d) {
    if (d >= ROTARY) return head[d];
    return d < ROTARY / 2 ? head[d] * turn.x - head[d + ROTARY / 2] * turn.y
                          : head[d] * turn.x + head[d - ROTARY / 2] * turn.y;
}

// GROUP칸을 int8로 적고 fp16 scale 하나를 남긴다. 이어진 GROUP개 스레드가 함께 부른다.
__device__ __forceinline__ void store_int8(signed char* values, u16* scales, int d, float value) {
// GROUP칸의 절댓값 가운데 가장 큰 것이 127이 된다
    float largest = fabsf(value);
    for (int step = GROUP / 2; step; step >>= 1)
        largest = fmaxf(largest, __shfl_xor_sync(__activemask(), largest, step));
    u16 bits = narrow<false>(largest / 127.f);
    float scale = widen<false>(bits);
    values[d] = (signed char)(scale > 0.f ? fminf(fmaxf(rintf(value / scale), -127.f), 127.f) : 0.f);
    if (d % GROUP == 0) scales[d / GROUP] = bits;
}

__device__ __forceinline__ float float_at(const uint4& four, int j) {
    return __uint_as_float(j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w);
}

__device__ __forceinline__ float int8_at(const uint4& packed, int j) {
    u32 word = j < 4 ? packed.x : j < 8 ? packed.y : j < 12 ? packed.z : packed.w;
    return (float)((int)(word << (3 - j % 4) * 8) >> 24);
}

// qkv 벡터에서 q, k, v가 시작하는 자리. GPT-NeoX는 머리마다 q, k, v가 번갈아 있고 나머지는 q 전체, k 전체, v 전체다.
__device__ __forceinline__ int query_at(int head) { return INTERLEAVED ? head * 3 * HEAD_DIM : head * HEAD_DIM; }
__device__ __forceinline__ int key_at(int head) {
    return INTERLEAVED ? (head * 3 + 1) * HEAD_DIM : QDIM + head * HEAD_DIM;
}
__device__ __forceinline__ int value_at(int head) {
    return INTERLEAVED ? (head * 3 + 2) * HEAD_DIM : QDIM + KVDIM + head * HEAD_DIM;
}

// 워프 하나가 머리 하나를 [HEAD_DIM] 옮기며 RMS norm을 한다. weight가 널이면 그대로 옮긴다.
__device__ __forceinline__ void copy_head(const float* source, float* target, const float* weight) {
// 레인 하나가 32칸 간격으로 PER_LANE칸을 맡는다
    enum { PER_LANE = (HEAD_DIM + 31) / 32 };
    int lane = threadIdx.x & 31;
    float value[PER_LANE], gain[PER_LANE], square = 0.f;
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + i * 32;
        value[i] = d < HEAD_DIM ? __ldcg(source + d) : 0.f;
        gain[i] = weight && d < HEAD_DIM ? __ldg(weight + d) : 1.f;  // 더하기 전에 읽어 기다림을 겹친다
    }
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) square += value[i] * value[i];
    float scale = weight ? rsqrtf(warp_sum(square) / HEAD_DIM + EPS) : 1.f;
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + i * 32;
        if (d < HEAD_DIM) target[d] = value[i] * scale * gain[i];
    }
}

// 머리의 d번째 칸을 공유 메모리에 두는 자리. 레인마다의 LANE칸을 네 칸씩 레인의 차례로 놓아, 이웃한 레인들이 이어진 128바이트를
// 읽는다. 칸의 차례대로 두면 레인들이 같은 은행에 부딪쳐 네 배가 걸린다.
__device__ __forceinline__ int lane_place(int d) { return ((d % LANE / 4) * (HEAD_DIM / LANE) + d / LANE) * 4 + d % 4; }
// 그 자리에 든 칸.
__device__ __forceinline__ int lane_column(int place) {
    return place / 4 % (HEAD_DIM / LANE) * LANE + place / 4 / (HEAD_DIM / LANE) * 4 + place % 4;
}

// attention을 세는 블록의 공유 메모리. query와 sums의 칸은 `lane_place`의 차례다. N은 스레드 수, Q는 맡은 q 머리의 수다.
// decode_plan.py의 `_attend_space`가 크기를 센다.
template <int N, int Q> struct AttendSpace {
    float raw[Q + 2][HEAD_DIM], query[Q][HEAD_DIM], sums[N / 32][Q][HEAD_DIM];
    float2 peaks[N / 32][Q];  // 워프마다의 (최댓값, 지수의 합)
    __align__(16) signed char fresh[2][HEAD_DIM];
    u16 fresh_scales[2][HEAD_DIM / GROUP];
};

// 함께 곱한 q, k, v에서 attention 하나가 기다리는 묶음: K, V 머리 하나와 그것을 함께 쓰는 q 머리들.
struct HeadGroup {
    enum { TILES = (PER_KV + 2) * HEAD_DIM / ROWS };
    __device__ __forceinline__ static int of(int tile) {
        int row = tile * ROWS;
        if (INTERLEAVED) return row / (3 * HEAD_DIM);
        return row < QDIM ? row / HEAD_DIM / PER_KV : (row - QDIM) % KVDIM / HEAD_DIM;
    }
// 이 묶음(tile)에서 시작하는 q 머리. 없으면 -1이다
    __device__ __forceinline__ static int query_of(int tile) {
        int row = tile * ROWS, step = INTERLEAVED ? 3 * HEAD_DIM : HEAD_DIM;
        return row % step == 0 && (INTERLEAVED || row < QDIM) ? row / step : -1;
    }
};

// 블록 blocks개가 첫 쪽에 든 모든 머리의 지난 K, V를 L2로 당겨 둔다.
__device__ __forceinline__ void prefetch_cache(const Attention& attention, u8* bytes, int position, int block,
                                               int blocks) {
    int oldest = attention.window && position >= attention.window ? position + 1 - attention.window : 0;
    for (int i = block * THREADS + threadIdx.x; i < (position - oldest) * KV_HEADS; i += blocks * THREADS) {
        int head = i % KV_HEADS;
        Page page(bytes, oldest + i / KV_HEADS);
        for (int kind = 0; kind < 2; kind++) {
            for (int at = 0; at < HEAD_DIM; at += 128) prefetch(page.values(kind, attention.layer, head) + at);
            if (page.slot % 16 == 0) prefetch(page.scales(kind, attention.layer, head));
        }
    }
}

// 새 토큰의 K, V를 cache에 더하고, q 머리 first_head부터 Q개의 attention을 위치의 한 토막에서 센다.
// 레인 SPAN개가 위치 하나를 맡고, 저마다 제 위치들의 softmax를 이어 가다가 끝에 한 번 합친다. 그래서 도는 동안 동기화가
// 없다. 토막이 여럿이면(SPLIT) 머리마다 마지막에 끝난 블록이 토막의 결과를 합친다.
//   N: 스레드 수. lines: 함께 답하는 줄이 여럿인지.
//   qkv: fp32 [QDIM + 2 KVDIM], pages: [PAGES], first_page: 그 첫 쪽. 토막이 하나면 모든 위치가 여기에 있다.
//   out: 16비트 [위, 아래][QDIM]
//   partial: [HEADS][splits][HEAD_DIM + 2](합, 최댓값, 지수의 합), done: [HEADS]는 늘 0으로 되돌려 놓는다
//   wait: q, k, v가 다 적히기를 기다린다. 지난 위치의 K와 V는 그와 상관이 없으므로 먼저 읽기 시작한다.
template <int N, int Q, bool SPLIT, class Wait>
__device__ __forceinline__ void attend_job(AttendSpace<N, Q>& space, const float* qkv, const Attention& attention,
                                           u8* const* pages, u8* first_page, int position, int first_head, int split,
                                           int splits, bool lines, float* partial, int* done, u16* out, const Wait& wait) {
    enum { LANES = HEAD_DIM / LANE, SPAN = LANES <= 2 ? 2 : LANES <= 4 ? 4 : LANES <= 8 ? 8 : 16,
           AT_ONCE = N / SPAN, STEPS = SPLIT ? 4 : 1, KEY = Q, WARPS_HERE = N / 32,
           PER_LANE = (HEAD_DIM + 31) / 32 };
    int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, part = tid % SPAN, sub = tid / SPAN;
    int kv = first_head / PER_KV, layer = attention.layer;
// 볼 위치는 oldest부터 position까지. ALONE개를 넘으면 CHUNK의 배수 per개씩 나눈다
    int oldest = attention.window && position >= attention.window ? position + 1 - attention.window : 0;
    int seen = position + 1 - oldest;
    int per = !SPLIT || seen <= ALONE ? seen : ((seen + splits - 1) / splits + CHUNK - 1) / CHUNK * CHUNK;
    int active = SPLIT ? (seen + per - 1) / per : 1, begin = oldest + split * per, end = min(begin + per, position + 1);
    if (split >= active) return;

// 위치 하나의 K와 V는 SPAN개 레인이 16칸씩 나누어 쥔다. 스레드는 한 번에 위치 STEPS개를 맡는다
    struct Held {
        uint4 key[STEPS], value[STEPS];
        u16 key_scale[STEPS], value_scale[STEPS];
    } next;
    auto page_of = [&](int row) { return SPLIT ? Page(pages, row) : Page(first_page, row); };
    auto load = [&](int from) {
        #pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int row = from + sub + s * AT_ONCE;
            next.key[s] = next.value[s] = {0, 0, 0, 0};
            next.key_scale[s] = next.value_scale[s] = 0;
            if (part >= LANES || row >= end || row == position) continue;
            Page page = page_of(row);
            next.key[s] = __ldcg((const uint4*)page.values(0, layer, kv) + part);
            next.value[s] = __ldcg((const uint4*)page.values(1, layer, kv) + part);
            next.key_scale[s] = __ldcg(page.scales(0, layer, kv) + part * LANE / GROUP);
            next.value_scale[s] = __ldcg(page.scales(1, layer, kv) + part * LANE / GROUP);
        }
    };
    load(begin);
    Page here = page_of(position);
    float2 turn[PER_LANE];
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        turn[i] = turn_of(attention.turn < 0 ? 0 : here.turns(attention.turn), lane + i * 32);
    wait();

// q, k, v 머리를 워프가 하나씩 옮기며 norm하고 돌린다. 새 토큰의 위치를 맡은 블록만 k와 v를 쓴다
    bool is_last = end == position + 1;
    for (int v = warp; v < (is_last ? Q + 2 : Q); v += WARPS_HERE) {
        if (v < Q) copy_head(qkv + query_at(first_head + v), space.raw[v], attention.q_norm);
        else if (v == KEY) copy_head(qkv + key_at(kv), space.raw[v], attention.k_norm);
        else copy_head(qkv + value_at(kv), space.raw[v], 0);
        __syncwarp();
        #pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + i * 32;
            if (d >= HEAD_DIM) continue;
            float turned = v <= KEY ? rotate(space.raw[v], turn[i], d) : space.raw[v][d];
            if (v < Q) space.query[v][lane_place(d)] = turned * ATTENTION_SCALE;
            else store_int8(space.fresh[v - Q], space.fresh_scales[v - Q], d, turned);
        }
    }
    __syncthreads();
// K, V 머리를 함께 쓰는 블록이 여럿이면 첫 블록만 cache에 적는다
    if (is_last && first_head % PER_KV == 0 && tid < 2 * LANES) {
        int kind = tid / LANES, i = tid % LANES;
        ((uint4*)here.values(kind, layer, kv))[i] = ((const uint4*)space.fresh[kind])[i];
        here.scales(kind, layer, kv)[i * LANE / GROUP] = space.fresh_scales[kind][i * LANE / GROUP];
    }

// 이어 가는 softmax: 지금까지의 최댓값, 지수의 합, 지수를 곱한 V의 합. 위치 하나를 맡은 레인들이 같은 값을 쥔다
    float largest[Q], total[Q], sum[Q][LANE];
    #pragma unroll
    for (int h = 0; h < Q; h++) {
        largest[h] = -1e30f, total[h] = 0.f;
        for (int j = 0; j < LANE; j++) sum[h][j] = 0.f;
    }
// 이어서 셀 때는(STEPS 1) 펼치지 않는다: 한 번만 지나는 명령은 캐시에 없어서 읽어 오는 시간이 계산보다 길다. 따로 셀 때는
// 위치가 많으므로 펼쳐서 읽기를 겹친다
    #pragma unroll 1
    for (int from = begin; from < end; from += AT_ONCE * STEPS) {
        if (SPLIT && from > begin) load(from);
        Held kept = next, &now = SPLIT ? next : kept;
        if (!SPLIT) load(from + AT_ONCE);
        #pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (part < LANES && from + sub + s * AT_ONCE == position) {  // 새 토큰의 것은 방금 만든 것을 쓴다
                now.key[s] = ((const uint4*)space.fresh[0])[part], now.value[s] = ((const uint4*)space.fresh[1])[part];
                now.key_scale[s] = space.fresh_scales[0][part * LANE / GROUP];
                now.value_scale[s] = space.fresh_scales[1][part * LANE / GROUP];
            }
// 점수 = q k. int8을 푼 값은 블록의 q 머리들이 함께 쓴다
        float score[STEPS][Q];
        #pragma unroll
        for (int s = 0; s < STEPS; s++) {
            float dot[Q] = {};
            #pragma unroll
            for (int four = 0; four < LANE / 4; four++) {
                uint4 query[Q];
                #pragma unroll
                for (int h = 0; h < Q; h++)
                    query[h] = part < LANES ? ((const uint4*)space.query[h])[four * LANES + part] : uint4{0, 0, 0, 0};
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    float one = int8_at(now.key[s], four * 4 + j);
                    #pragma unroll
                    for (int h = 0; h < Q; h++) dot[h] += float_at(query[h], j) * one;
                }
            }
            #pragma unroll
            for (int h = 0; h < Q; h++) {
                dot[h] *= widen<false>(now.key_scale[s]);
                for (int step = SPAN / 2; step; step >>= 1) dot[h] += __shfl_xor_sync(~0u, dot[h], step);
                score[s][h] = from + sub + s * AT_ONCE < end ? dot[h] : -1e30f;
            }
        }
        #pragma unroll
        for (int h = 0; h < Q; h++) {
            float most = largest[h];
            #pragma unroll
            for (int s = 0; s < STEPS; s++) most = fmaxf(most, score[s][h]);
            if (SPLIT || most > largest[h]) {
                float shrink = expf(largest[h] - most);
                total[h] *= shrink, largest[h] = most;
                #pragma unroll
                for (int j = 0; j < LANE; j++) sum[h][j] *= shrink;
            }
        }
        #pragma unroll
        for (int s = 0; s < STEPS; s++) {
            float weight[Q];
            #pragma unroll
            for (int h = 0; h < Q; h++) {
                weight[h] = from + sub + s * AT_ONCE < end ? expf(score[s][h] - largest[h]) : 0.f;
                total[h] += weight[h], weight[h] *= widen<false>(now.value_scale[s]);
            }
            #pragma unroll
            for (int j = 0; j < LANE; j++) {
                float one = int8_at(now.value[s], j);
                #pragma unroll
                for (int h = 0; h < Q; h++) sum[h][j] += weight[h] * one;
            }
        }
    }
// 워프 안의 위치들을 합친다: 최댓값을 맞추고 더한다
    #pragma unroll
    for (int h = 0; h < Q; h++) {
        float top = largest[h];
        for (int step = SPAN; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        float shrink = expf(largest[h] - top);
        total[h] *= shrink;
        for (int step = SPAN; step < 32; step <<= 1) total[h] += __shfl_xor_sync(~0u, total[h], step);
        #pragma unroll
        for (int j = 0; j < LANE; j++) {
            sum[h][j] *= shrink;
            for (int step = SPAN; step < 32; step <<= 1) sum[h][j] += __shfl_xor_sync(~0u, sum[h][j], step);
        }
        if (lane < LANES)
            #pragma unroll
            for (int j = 0; j < LANE; j += 4)
                ((uint4*)space.sums[warp][h])[j / 4 * LANES + lane] = {
                    __float_as_uint(sum[h][j]), __float_as_uint(sum[h][j + 1]), __float_as_uint(sum[h][j + 2]),
                    __float_as_uint(sum[h][j + 3])};
        if (lane == 0) space.peaks[warp][h] = {top, total[h]};
    }
    __syncthreads();

    auto give = [&](int head, int d, float value_) {
        u16* target = out + (lines ? line_place(head * HEAD_DIM + d) : head * HEAD_DIM + d);
        store_split<ACT_BF16>(target, target + QDIM, value_ * IN_SCALE);
    };
// 워프들을 합친다. 토막이 하나뿐이면 여기서 끝나고, 아니면 토막의 결과를 남긴다
    for (int i = tid; i < Q * HEAD_DIM; i += N) {
        int h = i / HEAD_DIM, place = i % HEAD_DIM, d = lane_column(place);
        float top = -1e30f, whole = 0.f, merged = 0.f;
        for (int w = 0; w < WARPS_HERE; w++) top = fmaxf(top, space.peaks[w][h].x);
        #pragma unroll 4
        for (int w = 0; w < WARPS_HERE; w++) {
            float shrink = expf(space.peaks[w][h].x - top);
            whole += space.peaks[w][h].y * shrink, merged += space.sums[w][h][place] * shrink;
        }
        float* mine = partial + ((size_t)(first_head + h) * splits + split) * (HEAD_DIM + 2);
        if (active == 1) give(first_head + h, d, merged / whole);
        else mine[d] = merged;
        if (active > 1 && d == 0) mine[HEAD_DIM] = top, mine[HEAD_DIM + 1] = whole;
    }
    if (!SPLIT || active == 1) return;
// 마지막에 끝난 블록이 토막들을 합친다: 최댓값을 맞추어 지수의 합으로 나눈다
    __threadfence();
    __syncthreads();
    __shared__ bool last;
    if (tid == 0) last = atomicAdd(done + first_head, 1) == active - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (tid == 0) done[first_head] = 0;
    for (int i = tid; i < Q * HEAD_DIM; i += N) {
        int h = i / HEAD_DIM, d = i % HEAD_DIM;
        const float* all = partial + (size_t)(first_head + h) * splits * (HEAD_DIM + 2);
        float top = -1e30f, whole = 0.f, merged = 0.f;
        for (int s = 0; s < active; s++) top = fmaxf(top, __ldcg(all + s * (HEAD_DIM + 2) + HEAD_DIM));
        #pragma unroll 4
        for (int s = 0; s < active; s++) {
            const float* one = all + s * (HEAD_DIM + 2);
            float shrink = expf(__ldcg(one + HEAD_DIM) - top);
            whole += __ldcg(one + HEAD_DIM + 1) * shrink, merged += __ldcg(one + d) * shrink;
        }
        give(first_head + h, d, merged / whole);
    }
}

// grid (HEADS / HEADS_PER_BLOCK, SPLITS 이하, 함께 답하는 줄의 수). 줄마다 메모리가 이어져 있다.
extern "C" __global__ void __launch_bounds__(ATTENDERS) attend(
    const float* qkv, Attention attention, u8* const* pages, const int* state, float* partial, int* done, u16* out) {
    __shared__ AttendSpace<ATTENDERS, HEADS_PER_BLOCK> space;
    let_next_kernel_start();
    int line = blockIdx.z;
    attend_job<ATTENDERS, HEADS_PER_BLOCK, true>(space, qkv + line * (QDIM + 2 * KVDIM), attention, pages + line * PAGES, 0,
                                state[line * 6], blockIdx.x * HEADS_PER_BLOCK, blockIdx.y, gridDim.y, gridDim.z > 1,
                                partial + line * HEADS * gridDim.y * (HEAD_DIM + 2), done + line * HEADS,
                                out + line * 2 * QDIM, [] { wait_for_previous_kernel(); });
}
