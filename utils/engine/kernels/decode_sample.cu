// 다음 토큰을 GPU에서 고른다: 페널티, 온도, top-k, top-p, 뽑기. 블록 하나가 어휘 전체를 다룬다.
// 어휘가 작으면(HELD <= 40, 4만 토큰) 로짓을 레지스터에 쥐고, 크면 로짓이 있던 메모리(L2)에서 돌 때마다 다시 읽는다.
// state: [0] 위치 [1] 답의 길이 [2] top_k [3] n-gram의 크기 [4], [5] 시드. settings: 온도, top_p, 페널티.

#define NEVER __uint_as_float(0xff800000u)  // -inf
#define MOST_K 256
#define HELD ((VOCAB + CHOOSERS - 1) / CHOOSERS)
#define WORDS ((VOCAB + 31) / 32)
#define IN_REGISTERS (HELD <= 40)
#define LOGITS ((VOCAB + 3) / 4 * 4)  // 로짓 한 줄의 폭. 16바이트씩 읽는다

// 스레드 하나가 맡은 로짓 HELD개: 번호 threadIdx.x + j * CHOOSERS.
struct Values {
    float held[IN_REGISTERS ? HELD : 1];
    float* memory;

    __device__ __forceinline__ float get(int j) const {
        if (IN_REGISTERS) return held[IN_REGISTERS ? j : 0];
        int i = threadIdx.x + j * CHOOSERS;
        return i < VOCAB ? __ldcg(memory + i) : NEVER;
    }
    __device__ __forceinline__ void set(int j, float value) {
        if (IN_REGISTERS) held[IN_REGISTERS ? j : 0] = value;
        else if (threadIdx.x + j * CHOOSERS < VOCAB) memory[threadIdx.x + j * CHOOSERS] = value;
    }
};
// 레지스터에 쥔 것은 다 펼쳐야 하고, 메모리의 것은 여덟씩 펼치면 읽기가 겹친다.
#if IN_REGISTERS
#define FOR_EACH _Pragma("unroll") for (int j = 0; j < HELD; j++)
#else
#define FOR_EACH _Pragma("unroll 8") for (int j = 0; j < HELD; j++)
#endif

// 세는 이(counter)로 만드는 난수: Philox 4x32-10 (Salmon 외, 2011). 같은 시드의 같은 순번은 늘 같은 수다.
__device__ __forceinline__ u32 philox(u32 counter, u32 key0, u32 key1) {
// 네 워드 가운데 하나만 쓴다
    u32 c0 = counter, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return c0;
}

// float의 크기 차례를 지키는 정수.
__device__ __forceinline__ u32 order_key(float value) {
// 양수는 부호 비트를 세우고 음수는 모두 뒤집으면 정수의 차례가 실수의 차례와 같아진다
    u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// 무게의 합이 target 이상인 가장 큰 문턱 key. 위의 비트부터 정한다. weight가 1이면 top-k, 확률이면 top-p다.
template <class Weight>
__device__ __forceinline__ u32 threshold(const Values& value, Weight weight, float target, float (*scratch)[32]) {
    u32 key = 0;
    for (int bit = 31; bit >= 0; bit--) {
// 이 비트를 세워도 합이 target 이상이면 세운다
        u32 trial = key | 1u << bit;
        float sum = 0.f;
        FOR_EACH {
            float v = value.get(j);
            if (order_key(v) >= trial) sum += weight(v);
        }
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
// 두 줄을 번갈아 쓰므로 동기화가 비트마다 한 번이다
        float* line = scratch[bit & 1];
        if ((threadIdx.x & 31) == 0) line[threadIdx.x >> 5] = sum;
        __syncthreads();
        sum = line[threadIdx.x & 31];
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (sum >= target) key = trial;
    }
    return key;
}

// 앞 스레드들의 합(자기 포함)과 전체의 합.
__device__ __forceinline__ float2 running_sum(float value, float* scratch) {
// 워프 안의 앞쪽 합
    for (int step = 1; step < 32; step <<= 1) {
        float other = __shfl_up_sync(~0u, value, step);
        if ((threadIdx.x & 31) >= step) value += other;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 31) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
// 앞 워프들의 합을 더한다
    float ahead = 0.f, total = 0.f;
    for (int w = 0; w < CHOOSERS / 32; w++) {
        if (w == threadIdx.x >> 5) ahead = total;
        total += scratch[w];
    }
    return {ahead + value, total};
}

// top-k가 작을 때. 스레드마다의 최댓값 가운데 k번째는 전체의 k번째 이하이므로, 그 이상인 후보만 모아 줄 세운다.
__device__ __forceinline__ bool choose_few(const Values& value, int top_k, float top_p, float inverse,
                                           float largest, float luck, float (*lines)[32], int* chosen) {
    __shared__ float found[CHOOSERS], ranked[CHOOSERS];
    __shared__ int found_id[CHOOSERS], ranked_id[CHOOSERS], amount;
    int tid = threadIdx.x;
    float most = NEVER;
    FOR_EACH most = fmaxf(most, value.get(j));
// 스레드마다의 최댓값들에서 top_k번째를 찾는다
    u32 mine = order_key(most), cut = 0;
    for (int bit = 31; bit >= 0; bit--) {
        u32 trial = cut | 1u << bit;
        if (__syncthreads_count(mine >= trial) >= top_k) cut = trial;
    }
    if (tid == 0) amount = 0;
    __syncthreads();
    FOR_EACH {
        float v = value.get(j);
        if (order_key(v) < cut || tid + j * CHOOSERS >= VOCAB) continue;
// 모이는 차례는 그때그때 다르지만 아래에서 값과 번호로 줄을 세우므로 답은 같다
        int place = atomicAdd(&amount, 1);
        if (place < CHOOSERS) found[place] = v, found_id[place] = tid + j * CHOOSERS;
    }
    __syncthreads();
    if (amount > CHOOSERS) return false;
    if (tid < amount) {
        float own = found[tid];
        int id = found_id[tid], rank = 0;
        for (int i = 0; i < amount; i++) rank += found[i] > own || found[i] == own && found_id[i] < id;
        ranked[rank] = own, ranked_id[rank] = id;
    }
    __syncthreads();
// 줄 세운 것에서 top-k, top-p를 차례로 자르고 하나를 뽑는다
    bool kept = tid < amount && ranked[tid] >= ranked[min(top_k, amount) - 1];
    float weight = kept ? expf((ranked[tid] - largest) * inverse) : 0.f;
    float2 sum = running_sum(weight, lines[0]);
    weight = sum.x - weight < top_p * sum.y ? weight : 0.f;
    sum = running_sum(weight, lines[1]);
    float drawn = luck * sum.y;
    if (weight > 0.f && drawn >= sum.x - weight && drawn < sum.x) *chosen = ranked_id[tid];
    return true;
}

__device__ __forceinline__ void choose_many(Values& value, int top_k, float top_p, float inverse, float largest,
                                            float luck, float (*lines)[32], int* chosen) {
    int tid = threadIdx.x;
    float sum = 0.f;
// top-k: k번째 값보다 작은 것을 지운다
    if (top_k > 0 && top_k < VOCAB) {
        u32 cut = threshold(value, [](float) { return 1.f; }, (float)top_k, lines);
        FOR_EACH if (order_key(value.get(j)) < cut) value.set(j, NEVER);
        __syncthreads();
    }
    FOR_EACH {
        float weight = expf((value.get(j) - largest) * inverse);
        value.set(j, weight);
        sum += weight;
    }
// top-p: 큰 것부터 더해 top_p에 닿게 하는 문턱 아래를 지운다
    if (top_p < 1.f) {
        float total = block_sum(sum, lines[0]);
        __syncthreads();
        u32 cut = threshold(value, [](float v) { return v; }, top_p * total, lines);
        sum = 0.f;
        FOR_EACH {
            float weight = value.get(j);
            if (order_key(weight) < cut) weight = 0.f, value.set(j, 0.f);
            sum += weight;
        }
    }
// 남은 무게를 차례로 늘어놓고 luck이 떨어지는 자리를 고른다
    float2 running = running_sum(sum, lines[1]);
    float drawn = luck * running.y, low = running.x - sum;
    if (sum > 0.f && drawn >= low && drawn < running.x) {
// 더하기의 오차로 끝을 넘으면 마지막으로 무게가 있던 것을 고른다
        int pick = -1;
        FOR_EACH {
            float weight = value.get(j);
            if (weight > 0.f && (pick < 0 || drawn >= low)) pick = tid + j * CHOOSERS;
            low += weight;
        }
        *chosen = pick;
    }
}

// 다음 토큰을 고르고 그 embedding을 잔차 x에 적는다. 줄마다 블록 하나다. used, banned: 어휘마다 한 비트. 답에 나온 토큰과 막을 토큰이다.
//   logits: fp32 [줄][LOGITS], LOGITS는 VOCAB를 4의 배수로 올린 것. told: 핀 고정된 CPU 메모리.
extern "C" __global__ void __launch_bounds__(CHOOSERS, 1) choose(
    float* logits, int* state, const float* settings, int* answer, int* told, const u16* embedding, float* x) {
    int line = blockIdx.x;  // 함께 답하는 줄의 번호
    logits += (size_t)line * LOGITS, state += line * 6, answer += (size_t)line * CONTEXT, told += (size_t)line * CONTEXT;
    x += (size_t)line * HIDDEN;
    u32* used = (u32*)shared;
    u32* banned = used + WORDS;
    __shared__ float lines[2][32];
    __shared__ u64 best;
    __shared__ int chosen;
    int tid = threadIdx.x, count = state[1], top_k = state[2], size = state[3];
    float temperature = settings[0], top_p = settings[1], penalty = settings[2];
    for (int i = tid; i < WORDS; i += CHOOSERS) used[i] = banned[i] = 0;
    if (tid == 0) best = 0;
    __syncthreads();
// 앞 커널을 기다리는 동안 답에 나온 토큰과 막을 n-gram을 비트로 표시한다
    for (int i = tid; i < count; i += CHOOSERS) {
        if (penalty != 1.f) atomicOr(used + answer[i] / 32, 1u << answer[i] % 32);
        if (size < 1 || i < size - 1) continue;
        bool same = true;
        for (int j = 1; j < size; j++) same &= answer[i - j] == answer[count - j];
        if (same) atomicOr(banned + answer[i] / 32, 1u << answer[i] % 32);
    }
    wait_for_previous_kernel();
    __syncthreads();

// 페널티를 매기며 가장 큰 로짓을 찾는다
    Values value;
    value.memory = logits;
    bool marked = penalty != 1.f || size > 0;
    float most = NEVER;
    int place = tid;
// i번째 로짓 v를 순위에 넣는다. 번호가 커지는 차례로 부르므로 같으면 앞의 번호가 남는다
    auto rank = [&](int i, float v) {
        if (v > most) most = v, place = i;
    };
// i번째 로짓에 페널티를 매긴다. punished, never: used와 banned에서 i의 비트가 든 워드
    auto punish = [&](int i, float v, u32 punished, u32 never) {
        if (punished >> i % 32 & 1) v = v < 0.f ? v * penalty : v / penalty;
        return never >> i % 32 & 1 ? NEVER : v;
    };
#if IN_REGISTERS
    FOR_EACH {
        int i = tid + j * CHOOSERS;
        value.set(j, i < VOCAB ? __ldcg(logits + i) : NEVER);
    }
    if (marked)
        FOR_EACH {
            int i = tid + j * CHOOSERS;
            if (i < VOCAB) value.set(j, punish(i, value.get(j), used[i / 32], banned[i / 32]));
        }
    FOR_EACH rank(tid + j * CHOOSERS, value.get(j));
#else
// 16바이트씩 AT_ONCE개를 먼저 읽고 나서 다룬다. 하나씩 읽고 적으면 읽기가 겹치지 않는다
    enum { AT_ONCE = 4 };
    for (int base = tid; base < LOGITS / 4; base += CHOOSERS * AT_ONCE) {
        uint4 raw[AT_ONCE];
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (base + k * CHOOSERS < LOGITS / 4) raw[k] = __ldcg((const uint4*)logits + base + k * CHOOSERS);
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int i = (base + k * CHOOSERS) * 4;
            if (i >= LOGITS) break;
            u32 words[4] = {raw[k].x, raw[k].y, raw[k].z, raw[k].w};
            u32 punished = marked ? used[i / 32] : 0, never = marked ? banned[i / 32] : 0;
            #pragma unroll
            for (int w = 0; w < 4; w++) {
                if (i + w >= VOCAB) break;
                float v = __uint_as_float(words[w]);
                if ((punished | never) >> (i + w) % 32 & 1) logits[i + w] = v = punish(i + w, v, punished, never);
                rank(i + w, v);
            }
        }
    }
#endif
    u64 mine = (u64)order_key(most) << 32 | (u32)~place;
    for (int step = 16; step; step >>= 1) {
        u64 other = __shfl_xor_sync(~0u, mine, step);
        mine = other > mine ? other : mine;
    }
    if ((tid & 31) == 0) atomicMax(&best, mine);
    __syncthreads();
// 윗 32비트는 값, 아래 32비트는 번호를 뒤집은 것이다
    u32 top_key = best >> 32;
    if (tid == 0) chosen = (int)~(u32)best;
    float largest = __uint_as_float(top_key & 0x80000000u ? top_key & 0x7fffffffu : ~top_key);

    if (temperature > 0.f) {
        float inverse = 1.f / temperature, luck = (philox(count, state[4], state[5]) >> 8) * 5.9604645e-8f;
        if (top_k == 0 || top_k > MOST_K || !choose_few(value, top_k, top_p, inverse, largest, luck, lines, &chosen))
            choose_many(value, top_k, top_p, inverse, largest, luck, lines, &chosen);
    }
    __syncthreads();
// 다음 토큰의 잔차를 준비하고 상태를 하나 옮긴다
    int token = chosen;
    for (int i = tid; i < HIDDEN; i += CHOOSERS)
        x[i] = widen<BF16>(embedding[(size_t)token * HIDDEN + i]) * EMBEDDING_SCALE;
    if (tid == 0) {
        answer[count] = token;
        told[count] = token;
        state[0] += 1;
        state[1] = count + 1;
    }
}
