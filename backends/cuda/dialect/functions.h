// Functions made of the dialect's own: the same text on device and host, so the same bits.

GO_FN float go_neg(float a) { return -a; }
GO_FN float go_abs(float a) { return go_float(go_bits(a) & 0x7fffffffu); }
// Where a or b is NaN, these give a NaN, as torch does.
GO_FN float go_max(float a, float b) { return a > b || a != a ? a : b; }
GO_FN float go_min(float a, float b) { return a < b || a != a ? a : b; }
GO_FN int go_clamp(int a, int low, int high) { return a < low ? low : a > high ? high : a; }

// a / b for many a, with inverse = go_div(1, b) made once: three operations instead of ten, and the same bits as go_div
// wherever quotient and remainder are normal numbers (P. Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", theorem 8.3).
GO_FN float go_div_by(float a, float b, float inverse) {
    float q = go_mul(a, inverse);
    return go_fma(go_fma(go_neg(q), b, a), inverse, q);
}

// e^x to 1.5 units in the last place, between the ends of what float32 holds as normal numbers; beyond, the ends' values.
GO_FN float go_exp(float x) {
    x = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    float shifted = go_fma(x, 1.44269502f, 12582912.0f);  // its last bits are the whole number nearest to x / ln 2
    float n = go_sub(shifted, 12582912.0f);
    float r = go_fma(n, -0.693359375f, x);
    r = go_fma(n, 2.12194440e-4f, r);
    float p = go_fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = go_fma(p, r, 8.3334519073e-3f);
    p = go_fma(p, r, 4.1665795894e-2f);
    p = go_fma(p, r, 1.6666665459e-1f);
    p = go_fma(p, r, 5.0000001201e-1f);
    p = go_add(go_fma(p, go_mul(r, r), r), 1.0f);
    return go_mul(p, go_float((go_bits(shifted) - 0x4b400000u + 127u) << 23));
}
GO_FN float go_sigmoid(float x) { return go_div(1.0f, go_add(1.0f, go_exp(go_neg(x)))); }
GO_FN float go_silu(float x) { return go_div(x, go_add(1.0f, go_exp(go_neg(x)))); }
GO_FN float go_tanh(float x) {
    float s = go_mul(x, x);  // near zero by its series: the other form would lose the digits there
    float p = go_fma(go_fma(go_fma(go_fma(2.1869489e-2f, s, -5.3968254e-2f), s, 1.3333333e-1f), s, -3.3333333e-1f), s, 1.0f);
    return s < 0.09f ? go_mul(x, p) : go_fma(2.0f, go_sigmoid(go_mul(2.0f, x)), -1.0f);
}
GO_FN float go_relu(float x) { return x < 0.0f ? 0.0f : x; }

// The error function to 2e-7 (W. H. Press et al., "Numerical Recipes", erfc by a Chebyshev fit).
GO_FN float go_erf(float x) {
    float z = go_abs(x);
    float t = go_div(1.0f, go_fma(0.5f, z, 1.0f));
    float p = go_fma(0.17087277f, t, -0.82215223f);
    p = go_fma(p, t, 1.48851587f);
    p = go_fma(p, t, -1.13520398f);
    p = go_fma(p, t, 0.27886807f);
    p = go_fma(p, t, -0.18628806f);
    p = go_fma(p, t, 0.09678418f);
    p = go_fma(p, t, 0.37409196f);
    p = go_fma(p, t, 1.00002368f);
    p = go_fma(p, t, -1.26551223f);
    float tail = go_mul(t, go_exp(go_fma(go_neg(z), z, p)));
    return x < 0.0f ? go_sub(tail, 1.0f) : go_sub(1.0f, tail);
}
GO_FN float go_gelu(float x) { return go_mul(go_mul(0.5f, x), go_add(1.0f, go_erf(go_mul(x, 0.707106769f)))); }
GO_FN float go_gelu_tanh(float x) {
    float cube = go_mul(go_mul(x, x), x);
    return go_mul(go_mul(0.5f, x), go_add(1.0f, go_tanh(go_mul(0.797884583f, go_fma(0.044715f, cube, x)))));
}
