// The GPU's mapping: a thread owns VECTOR neighbouring neurons for all T steps.

// VECTOR neighbours in memory, moved together; the widest access is 16 bytes.
template <class E> struct alignas(sizeof(E) * VECTOR < 16 ? sizeof(E) * VECTOR : 16) Pack { E lane[VECTOR]; };

template <class E> INLINE Pack<E> load_pack(const E *from) { return *reinterpret_cast<const Pack<E> *>(from); }
template <class E> INLINE void store_pack(const Pack<E> &pack, E *to) { *reinterpret_cast<Pack<E> *>(to) = pack; }

typedef State States[VECTOR];

// The states of a thread's neurons where a segment starts, from the checkpoints, or from the initial states.
INLINE void load_states(const Call &call, const View &view, int segment, int64 neuron, States &states) {
    unroll<STATES>([&](auto j) LAMBDA {
        const real *from = segment ? call.checkpoints + ((segment - 1) * STATES + j) * view.neurons : call.initial[j];
        Pack<real> pack;
        if (from) pack = load_pack(from + neuron);
        unroll<VECTOR>([&](auto lane) LAMBDA {
            states[lane][j] = from ? pack.lane[lane] : real(call.initial_value[j]);
        });
    });
}

INLINE void store_state(const States &states, int j, real *to) {
    Pack<real> pack;
    unroll<VECTOR>([&](auto lane) LAMBDA { pack.lane[lane] = states[lane][j]; });
    store_pack(pack, to);
}

// A thread's place: its first neuron in turn `turn`, that neuron's channel, and whether there is one at all.
struct Place { int64 neuron, channel; bool inside; };

constexpr int ROW_THREADS = BLOCK / 32;  // with COLUMNS a block is 32 columns wide and ROW_THREADS rows tall

INLINE int64 blocks_across(const Call &call) {
    return COLUMNS ? (call.channels + 32 * VECTOR - 1) / (32 * VECTOR) : call.channels;
}

// With COLUMNS a block walks down `rows` outer positions of its columns. Without, it takes `rows` tiles of one channel,
// whose neurons are counted through all outer positions.
INLINE Place place_of(const Call &call, int turn) {
    const int64 across = blocks_across(call), b = blockIdx.x;
    if (COLUMNS) {
        const int64 column = (b % across * 32 + threadIdx.x % 32) * VECTOR;
        const int64 position = int64(turn) * ROW_THREADS + threadIdx.x / 32, o = b / across * call.rows + position;
        return {o * call.channels + column, column, position < call.rows && o < call.outer && column < call.channels};
    }
    const int64 channel = b % across, size = call.outer * call.inner;
    const int64 n = ((b / across * call.rows + turn) * BLOCK + threadIdx.x) * VECTOR;
    int64 o = 0, position = n;
    if (call.outer > 1) {
        o = size < 0x7fffffff ? int64(bits32(n) / bits32(call.inner)) : n / call.inner;
        position = n - o * call.inner;
    }
    return {(o * call.channels + channel) * call.inner + position, channel, n < size};
}

// The channel whose parameters a thread's lane has.
INLINE int64 channel_of(const Call &call, const Place &place, int lane) {
    if (!COLUMNS) return place.channel;
    return call.neighbours == 1 ? place.channel + lane : (place.channel + lane) / call.neighbours;
}

INLINE int turns(const Call &call) {
    return int(COLUMNS ? (call.rows + ROW_THREADS - 1) / ROW_THREADS : call.rows);
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(BLOCK) forward(const Call call) {
    const View view = view_of(call);
    for (int turn = 0; turn < turns(call); turn++) {
        const Place place = place_of(call, turn);
        if (!place.inside) continue;
        States states;
        load_states(call, view, 0, place.neuron, states);
        for_segments<false>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            Pack<io> packs[L];
            unroll<L>([&](auto s) LAMBDA { packs[s] = load_pack(call.x + (t0 + s) * call.x_stride + place.neuron); });
            unroll<VECTOR>([&](auto lane) LAMBDA {
                real x[L];
                unroll<L>([&](auto s) LAMBDA { x[s] = load_(packs[s].lane[lane]); });
                walk<L>(view, place.neuron + lane, channel_of(call, place, lane), t0, x, states[lane]);
                unroll<L>([&](auto s) LAMBDA { store_(x[s], packs[s].lane[lane]); });
            });
            unroll<L>([&](auto s) LAMBDA {
                store_pack(packs[s], call.spikes + (t0 + s) * view.neurons + place.neuron);
            });
            if (t0 + L < T && call.checkpoints) unroll<STATES>([&](auto j) LAMBDA {
                store_state(states, j, call.checkpoints + (segment * STATES + j) * view.neurons + place.neuron);
            });
        });
        unroll<STATES>([&](auto j) LAMBDA {
            if (call.final[j]) store_state(states, j, call.final[j] + place.neuron);
        });
    }
}

#else
// Sums over the threads that share a channel: over the block, or with COLUMNS over the rows of each column. The result
// is for the threads for which keeps_sum() holds.
INLINE real sum_of_threads(real value) {
    __shared__ real shared[BLOCK];
    if (!COLUMNS)
        for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    real sum = 0;
    if (COLUMNS) for (int row = 0; row < ROW_THREADS; row++) sum += shared[row * 32 + threadIdx.x % 32];
    else for (int warp = 0; warp < ROW_THREADS; warp++) sum += shared[warp * 32];
    return sum;
}

INLINE bool keeps_sum() { return COLUMNS ? threadIdx.x < 32 : threadIdx.x == 0; }

// Where the sum of gradient g of a thread's lane goes.
INLINE real *partial_of(const Call &call, int g, int lane) {
    const int64 across = blocks_across(call), b = blockIdx.x;
    if (!COLUMNS) return call.partial + b * GRADS + g;
    const int64 column = (b % across * 32 + threadIdx.x % 32) * VECTOR + lane;
    return column < call.channels ? call.partial + (b / across * GRADS + g) * call.channels + column : nullptr;
}

constexpr int SUMS = COLUMNS ? VECTOR : 1;  // lanes share a sum where they share a channel

INLINE void flush(const Call &call, int g, int lane, real value, bool add) {
    const real sum = sum_of_threads(value);
    real *to = partial_of(call, g, lane);
    if (keeps_sum() && to) *to = add ? *to + sum : sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) backward(const Call call) {
    const View view = view_of(call);
    Totals totals[SUMS] = {};
    Stepwise<SEGMENT> stepwise[SUMS] = {};
    for (int turn = 0; turn < turns(call); turn++) {
        const Place place = place_of(call, turn);
        States grad_states;
        unroll<STATES>([&](auto j) LAMBDA {
            Pack<real> pack = {};
            if (place.inside && call.grad_final[j]) pack = load_pack(call.grad_final[j] + place.neuron);
            unroll<VECTOR>([&](auto lane) LAMBDA { grad_states[lane][j] = pack.lane[lane]; });
        });
        for_segments<true>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            if (place.inside) {
                Pack<io> packs[L], grads[L];
                unroll<L>([&](auto s) LAMBDA {
                    packs[s] = load_pack(call.x + (t0 + s) * call.x_stride + place.neuron);
                    grads[s] = load_pack(call.grad_spikes + (t0 + s) * call.grad_spikes_stride + place.neuron);
                });
                States states;
                load_states(call, view, segment, place.neuron, states);
                unroll<VECTOR>([&](auto lane) LAMBDA {
                    constexpr int sum = COLUMNS ? lane.value : 0;
                    real x[L], grad[L];
                    Stepwise<L> steps = {};
                    unroll<L>([&](auto s) LAMBDA {
                        x[s] = load_(packs[s].lane[lane]);
                        grad[s] = load_(grads[s].lane[lane]);
                    });
                    walk_back<L>(view, place.neuron + lane, channel_of(call, place, lane), t0, x, states[lane], grad,
                                 grad_states[lane], totals[sum], steps);
                    unroll<L>([&](auto s) LAMBDA { store_(grad[s], grads[s].lane[lane]); });
                    unroll<STEPWISE>([&](auto q) LAMBDA {
                        unroll<L>([&](auto s) LAMBDA { stepwise[sum][q][s] += steps[q][s]; });
                    });
                });
                if (call.grad_x) unroll<L>([&](auto s) LAMBDA {
                    store_pack(grads[s], call.grad_x + (t0 + s) * view.neurons + place.neuron);
                });
            }
            if constexpr (SEGMENTS > 1)  // no thread could hold a sum for every step of a long sequence
                unroll<SUMS>([&](auto lane) LAMBDA {
                    unroll<STEPWISE>([&](auto q) LAMBDA {
                        unroll<L>([&](auto s) LAMBDA {
                            flush(call, TOTALS + q * T + t0 + s, lane, stepwise[lane][q][s], turn > 0);
                            stepwise[lane][q][s] = 0;
                        });
                    });
                });
        });
        unroll<STATES>([&](auto j) LAMBDA {
            if (place.inside && call.grad_initial[j])
                store_state(grad_states, j, call.grad_initial[j] + place.neuron);
        });
    }
    unroll<SUMS>([&](auto lane) LAMBDA {
        unroll<TOTALS>([&](auto q) LAMBDA { flush(call, q, lane, totals[lane][q], false); });
        if constexpr (SEGMENTS == 1) unroll<STEPWISE>([&](auto q) LAMBDA {
            unroll<T>([&](auto s) LAMBDA { flush(call, TOTALS + q * T + s, lane, stepwise[lane][q][s], false); });
        });
    });
}

// The second pass: the blocks' sums to one sum per gradient and channel, in a fixed order. `rows` counts the blocks
// that share a channel. With COLUMNS a thread has its own sum, over neighbours as well, else a block has.
extern "C" __global__ void __launch_bounds__(BLOCK) finish(const Call call) {
    if (COLUMNS) {
        const int64 e = int64(blockIdx.x) * BLOCK + threadIdx.x;
        if (e >= GRADS * (call.channels / call.neighbours)) return;
        double sum = 0;
        for (int64 row = 0; row < call.rows; row++)
            for (int64 n = 0; n < call.neighbours; n++)
                sum += call.partial[row * GRADS * call.channels + e * call.neighbours + n];
        call.grad_parameters[e] = real(sum);
    } else {
        const int64 channel = blockIdx.x % call.channels, g = blockIdx.x / call.channels;
        real value = 0;
        for (int64 row = threadIdx.x; row < call.rows; row += BLOCK)
            value += call.partial[(row * call.channels + channel) * GRADS + g];
        const real sum = sum_of_threads(value);
        if (keeps_sum()) call.grad_parameters[g * call.channels + channel] = sum;
    }
}
#endif
