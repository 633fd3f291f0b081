// Runs one neuron over L time steps, from registers to registers.

typedef real Summed[AT_LEAST_ONE(SUMMED)];
template <int L> using ByStep = real[AT_LEAST_ONE(BY_STEP)][L];

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

// Replaces the L inputs by the spikes and advances the state. parameters(step, p) sets p to a step's parameters.
template <int L, class Source>
INLINE void walk(const View &view, int64 neuron, const Source &parameters, int t0, real (&x)[L], State &state) {
    unroll<L>([&](auto s) LAMBDA {
        Parameters p;
        parameters(s, p);
        step(x[s], state, p, x[s]);
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            view.sequences[j][(t0 + s) * view.neurons + neuron] = state[j];
        });
    });
}

#if BACKWARD
// Recomputes the states from the one at t0, then walks back. Replaces the L gradients of the spikes by those of x, the
// gradient of the last state by that of the first, and adds to the gradients of the parameters.
template <int L, class Source>
INLINE void walk_back(const View &view, int64 neuron, const Source &parameters, int t0, const real (&x)[L],
                      const State &first, real (&grad)[L], State &grad_state, Summed &summed, ByStep<L> &by_step) {
    real history[L][STATES];
    State state;
    unroll<STATES>([&](auto j) LAMBDA { state[j] = first[j]; });
    unroll<L>([&](auto s) LAMBDA {
        unroll<STATES>([&](auto j) LAMBDA { history[s][j] = state[j]; });
        if constexpr (s.value + 1 < L) {
            Parameters p;
            real spike;
            parameters(s, p);
            step(x[s], state, p, spike);
        }
    });
    unroll<L>([&](auto reversed) LAMBDA {
        constexpr int s = L - 1 - reversed.value;
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            grad_state[j] += view.grad_sequences[j][(t0 + s) * view.neurons + neuron];
        });
        Parameters p;
        real sum_p[AT_LEAST_ONE(LEARNED)];
        parameters(Constant<s>(), p);
        unroll<SUMMED>([&](auto q) LAMBDA { sum_p[q] = summed[q]; });
        unroll<BY_STEP>([&](auto q) LAMBDA { sum_p[SUMMED + q] = by_step[q][s]; });
        step_backward(x[s], history[s], p, grad[s], grad_state, sum_p, grad[s]);
        unroll<SUMMED>([&](auto q) LAMBDA { summed[q] = sum_p[q]; });
        unroll<BY_STEP>([&](auto q) LAMBDA { by_step[q][s] = sum_p[SUMMED + q]; });
    });
}
#endif
