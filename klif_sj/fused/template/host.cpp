// The host's loops: blocks of LANES neurons, vectorised over the neurons and shared among threads by OpenMP.
// A block's parameter gradients are summed in a fixed order whatever the number of threads.

static int64 blocks_of(int64 n, int64 size) { return (n + size - 1) / size; }

// Calls body(neuron, lanes, channel, row, first column) for every block. With COLUMNS every neuron of a block has its own
// channel (inner is 1) and a row of partial sums serves `rows` consecutive outer positions; without, a block lies
// within one channel and has its own row.
template <class Body> static void for_blocks(const Call &call, const Body &body) {
    if (COLUMNS) {
        const int64 wide = blocks_of(call.channels, LANES), tall = blocks_of(call.outer, call.rows);
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.threads > 1)
        for (int64 b = 0; b < tall * wide; b++) {
            const int64 row = b / wide, column = b % wide * LANES;
            const int64 last = (row + 1) * call.rows < call.outer ? (row + 1) * call.rows : call.outer;
            const int lanes = call.channels - column < LANES ? call.channels - column : LANES;
            for (int64 o = row * call.rows; o < last; o++)
                body(o * call.channels + column, lanes, column, row * GRADS * call.channels + column, call.channels,
                     o == row * call.rows);
        }
    } else {
        const int64 wide = blocks_of(call.inner, LANES);
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.threads > 1)
        for (int64 b = 0; b < call.outer * call.channels * wide; b++) {
            const int64 line = b / wide, position = b % wide * LANES;
            const int lanes = call.inner - position < LANES ? call.inner - position : LANES;
            body(line * call.inner + position, lanes, line % call.channels, b * GRADS, 1, true);
        }
    }
}

// The states where a segment starts, from the checkpoints, or from the initial states.
static void fill_states(const Call &call, int64 neurons, int segment, int64 first, int lanes, real (&states)[STATES][LANES]) {
    for (int j = 0; j < STATES; j++) {
        const real *from = segment ? call.checkpoints + ((segment - 1) * STATES + j) * neurons : call.initial[j];
        if (from) memcpy(states[j], from + first, lanes * sizeof(real));
        else for (int lane = 0; lane < lanes; lane++) states[j][lane] = real(call.initial_value[j]);
    }
}

// L time steps of a block in the arithmetic's type: where they are, or in a buffer where they must be converted. That has
// loops of its own: within an unrolled walk, conversions keep it from vectorising and cost the compiler many seconds.
template <class R> struct Rows { R *at; int64 stride; };
template <int L> using Buffer = real[L][LANES];
constexpr bool CONVERTS = sizeof(io) != sizeof(real);

template <int L> static Rows<const real> load_rows(const io *from, int64 stride, int lanes, Buffer<L> &buffer) {
    if (!CONVERTS) return {reinterpret_cast<const real *>(from), stride};
    for (int s = 0; s < L; s++)
#pragma omp simd
        for (int64 lane = 0; lane < lanes; lane++) buffer[s][lane] = load_(from[s * stride + lane]);
    return {buffer[0], LANES};
}

// Where results are to be written, before store_rows.
template <int L> static Rows<real> rows_for(io *to, int64 stride, Buffer<L> &buffer) {
    if (!CONVERTS && to) return {reinterpret_cast<real *>(to), stride};
    return {buffer[0], LANES};
}

template <int L> static void store_rows(const Buffer<L> &buffer, io *to, int64 stride, int lanes) {
    if (!CONVERTS || !to) return;
    for (int s = 0; s < L; s++)
#pragma omp simd
        for (int64 lane = 0; lane < lanes; lane++) store_(buffer[s][lane], to[s * stride + lane]);
}

// A lane's locals live in a function of their own, not in the loop: there, OpenMP would keep them in memory.
template <int L>
INLINE void forward_lane(const View &view, int64 first, int64 lane, int64 channel, int t0, Rows<const real> in,
                         Rows<real> out, real (&states)[STATES][LANES]) {
    State state;
    real x[L];
    unroll<STATES>([&](auto j) LAMBDA { state[j] = states[j][lane]; });
    unroll<L>([&](auto s) LAMBDA { x[s] = in.at[s * in.stride + lane]; });
    walk<L>(view, first + lane, channel, t0, x, state);
    unroll<L>([&](auto s) LAMBDA { out.at[s * out.stride + lane] = x[s]; });
    unroll<STATES>([&](auto j) LAMBDA { states[j][lane] = state[j]; });
}

// Large outputs are new memory in almost every call, and finding a small page at a time for them takes the system longer
// than the kernel computes: ask for large pages. Only advice; where it is not taken nothing changes.
static void expect_large(const void *start, int64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64 page = 1 << 21, first = (int64(start) + page - 1) / page * page, end = (int64(start) + bytes) / page * page;
    if (start && end > first) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
#endif
}

extern "C" void forward(const Call *launch) {
    const Call &call = *launch;
    expect_large(call.spikes, T * call.outer * call.channels * call.inner * int64(sizeof(io)));
    const View view = view_of(call);
    for_blocks(call, [&](int64 first, int lanes, int64 first_channel, int64, int64, bool) {
        real states[STATES][LANES];
        fill_states(call, view.neurons, 0, first, lanes, states);
        for_segments<false>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            const int64 neurons = view.neurons;
            io *spikes = call.spikes + t0 * neurons + first;
            Buffer<L> buffer;
            const auto in = load_rows<L>(call.x + t0 * call.x_stride + first, call.x_stride, lanes, buffer);
            const auto out = rows_for<L>(spikes, neurons, buffer);
#pragma omp simd
            for (int64 lane = 0; lane < lanes; lane++)
                forward_lane<L>(view, first, lane, first_channel + (COLUMNS ? lane : 0), t0, in, out, states);
            store_rows<L>(buffer, spikes, neurons, lanes);
            if (t0 + L < T && call.checkpoints)
                for (int j = 0; j < STATES; j++)
                    memcpy(call.checkpoints + (segment * STATES + j) * neurons + first, states[j], lanes * sizeof(real));
        });
        for (int j = 0; j < STATES; j++) memcpy(call.final[j] + first, states[j], lanes * sizeof(real));
    });
}

#if BACKWARD
// The second pass: rows of partial sums to one sum per gradient and channel, in double and in order.
static void finish(const Call &call) {
    const int64 wide = blocks_of(call.inner, LANES);
    for (int64 g = 0; g < GRADS; g++)
        for (int64 c = 0; c < call.channels; c++) {
            double sum = 0;
            if (COLUMNS)
                for (int64 row = 0; row < blocks_of(call.outer, call.rows); row++)
                    sum += call.partial[(row * GRADS + g) * call.channels + c];
            else
                for (int64 o = 0; o < call.outer; o++)
                    for (int64 b = 0; b < wide; b++)
                        sum += call.partial[((o * call.channels + c) * wide + b) * GRADS + g];
            call.grad_parameters[g * call.channels + c] = real(sum);
        }
}

template <int L>
INLINE void backward_lane(const View &view, int64 first, int64 lane, int64 channel, int t0, Rows<const real> in,
                          Rows<const real> grad_in, Rows<real> out, const real (&states)[STATES][LANES],
                          real (&grad_states)[STATES][LANES], real (&sums)[AT_LEAST_ONE(GRADS)][LANES]) {
    State state, grad_state;
    real x[L], grad[L];
    Totals totals = {};
    Stepwise<L> stepwise = {};
    unroll<STATES>([&](auto j) LAMBDA {
        state[j] = states[j][lane];
        grad_state[j] = grad_states[j][lane];
    });
    unroll<L>([&](auto s) LAMBDA {
        x[s] = in.at[s * in.stride + lane];
        grad[s] = grad_in.at[s * grad_in.stride + lane];
    });
    walk_back<L>(view, first + lane, channel, t0, x, state, grad, grad_state, totals, stepwise);
    unroll<L>([&](auto s) LAMBDA { out.at[s * out.stride + lane] = grad[s]; });
    unroll<STATES>([&](auto j) LAMBDA { grad_states[j][lane] = grad_state[j]; });
    unroll<TOTALS>([&](auto q) LAMBDA { sums[q][lane] += totals[q]; });
    unroll<STEPWISE>([&](auto q) LAMBDA {
        unroll<L>([&](auto s) LAMBDA { sums[TOTALS + q * T + t0 + s][lane] += stepwise[q][s]; });
    });
}

extern "C" void backward(const Call *launch) {
    const Call &call = *launch;
    expect_large(call.grad_x, T * call.outer * call.channels * call.inner * int64(sizeof(io)));
    const View view = view_of(call);
    for_blocks(call, [&](int64 first, int lanes, int64 first_channel, int64 slot, int64 grad_stride, bool fresh) {
        real states[STATES][LANES], grad_states[STATES][LANES], sums[AT_LEAST_ONE(GRADS)][LANES];
        memset(sums, 0, sizeof(sums));
        for (int j = 0; j < STATES; j++) {
            if (call.grad_final[j]) memcpy(grad_states[j], call.grad_final[j] + first, lanes * sizeof(real));
            else memset(grad_states[j], 0, sizeof(grad_states[j]));
        }
        for_segments<true>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            const int64 x_stride = call.x_stride, grad_stride = call.grad_spikes_stride, neurons = view.neurons;
            const io *from = call.x + t0 * x_stride + first, *grads_from = call.grad_spikes + t0 * grad_stride + first;
            io *grad_x = call.grad_x ? call.grad_x + t0 * neurons + first : nullptr;
            Buffer<L> inputs, grads;
            const auto in = load_rows<L>(from, x_stride, lanes, inputs);
            const auto grad_in = load_rows<L>(grads_from, grad_stride, lanes, grads);
            const auto out = rows_for<L>(grad_x, neurons, grads);
            fill_states(call, view.neurons, segment, first, lanes, states);
#pragma omp simd
            for (int64 lane = 0; lane < lanes; lane++)
                backward_lane<L>(view, first, lane, first_channel + (COLUMNS ? lane : 0), t0, in, grad_in, out, states,
                                 grad_states, sums);
            store_rows<L>(grads, grad_x, neurons, lanes);
        });
        for (int j = 0; j < STATES; j++)
            if (call.grad_initial[j]) memcpy(call.grad_initial[j] + first, grad_states[j], lanes * sizeof(real));
        for (int g = 0; g < GRADS; g++) {
            real *row = call.partial + slot + g * grad_stride;
            if (COLUMNS)
                for (int lane = 0; lane < lanes; lane++) row[lane] = (fresh ? real(0) : row[lane]) + sums[g][lane];
            else {
                real sum = 0;
                for (int lane = 0; lane < lanes; lane++) sum += sums[g][lane];
                *row = sum;
            }
        }
    });
    finish(call);
}
#endif
