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

// Calls body(Constant<length>, t0, segment) for every segment, in order or backwards.
template <bool REVERSED, class Body> INLINE void for_segments(Body &&body) {
    constexpr int TAIL = T % SEGMENT;
    if (REVERSED && TAIL) body(Constant<TAIL ? TAIL : 1>(), T - TAIL, SEGMENTS - 1);
    for (int n = 0; n < T / SEGMENT; n++) {
        const int segment = REVERSED ? T / SEGMENT - 1 - n : n;
        body(Constant<SEGMENT>(), segment * SEGMENT, segment);
    }
    if (!REVERSED && TAIL) body(Constant<TAIL ? TAIL : 1>(), T - TAIL, SEGMENTS - 1);
}

extern "C" void forward(const Call *launch) {
    const Call &call = *launch;
    const int64 neurons = call.outer * call.channels * call.inner;
    for_blocks(call, [&](int64 first, int lanes, int64 first_channel, int64, int64, bool) {
        real states[STATES][LANES];
        for_segments<false>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
#pragma omp simd
            for (int lane = 0; lane < lanes; lane++) {
                const int64 neuron = first + lane, channel = first_channel + (COLUMNS ? lane : 0);
                State state;
                if (segment == 0) load_initial(call, neuron, state);
                else unroll<STATES>([&](auto j) LAMBDA { state[j] = states[j][lane]; });
                real x[L];
                unroll<L>([&](auto s) LAMBDA { x[s] = load_(call.x[(t0 + s) * call.x_stride + neuron]); });
                walk<L>(call, neurons, neuron, channel, t0, x, state);
                unroll<L>([&](auto s) LAMBDA { store_(x[s], call.spikes[(t0 + s) * neurons + neuron]); });
                unroll<STATES>([&](auto j) LAMBDA { states[j][lane] = state[j]; });
            }
            if (t0 + L < T && call.checkpoints)
                for (int lane = 0; lane < lanes; lane++) {
                    State state;
                    unroll<STATES>([&](auto j) LAMBDA { state[j] = states[j][lane]; });
                    store_checkpoint(call, neurons, segment + 1, first + lane, state);
                }
        });
        unroll<STATES>([&](auto j) LAMBDA {
            if (call.final[j]) memcpy(call.final[j] + first, states[j], lanes * sizeof(real));
        });
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

extern "C" void backward(const Call *launch) {
    const Call &call = *launch;
    const int64 neurons = call.outer * call.channels * call.inner;
    for_blocks(call, [&](int64 first, int lanes, int64 first_channel, int64 slot, int64 grad_stride, bool fresh) {
        real grad_states[STATES][LANES], sums[AT_LEAST_ONE(GRADS)][LANES];
        memset(sums, 0, sizeof(sums));
        unroll<STATES>([&](auto j) LAMBDA {
            if (call.grad_final[j]) memcpy(grad_states[j], call.grad_final[j] + first, lanes * sizeof(real));
            else memset(grad_states[j], 0, sizeof(grad_states[j]));
        });
        for_segments<true>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
#pragma omp simd
            for (int lane = 0; lane < lanes; lane++) {
                const int64 neuron = first + lane, channel = first_channel + (COLUMNS ? lane : 0);
                State state, grad_state;
                load_checkpoint(call, neurons, segment, neuron, state);
                unroll<STATES>([&](auto j) LAMBDA { grad_state[j] = grad_states[j][lane]; });
                real x[L], grad[L];
                unroll<L>([&](auto s) LAMBDA {
                    x[s] = load_(call.x[(t0 + s) * call.x_stride + neuron]);
                    grad[s] = load_(call.grad_spikes[(t0 + s) * call.grad_spikes_stride + neuron]);
                });
                Totals totals = {};
                Stepwise<L> stepwise = {};
                walk_back<L>(call, neurons, neuron, channel, t0, x, state, grad, grad_state, totals, stepwise);
                if (call.grad_x) unroll<L>([&](auto s) LAMBDA {
                    store_(grad[s], call.grad_x[(t0 + s) * neurons + neuron]);
                });
                unroll<STATES>([&](auto j) LAMBDA { grad_states[j][lane] = grad_state[j]; });
                unroll<TOTALS>([&](auto q) LAMBDA { sums[q][lane] += totals[q]; });
                unroll<STEPWISE>([&](auto q) LAMBDA {
                    unroll<L>([&](auto s) LAMBDA { sums[TOTALS + q * T + t0 + s][lane] += stepwise[q][s]; });
                });
            }
        });
        unroll<STATES>([&](auto j) LAMBDA {
            if (call.grad_initial[j]) memcpy(call.grad_initial[j] + first, grad_states[j], lanes * sizeof(real));
        });
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
