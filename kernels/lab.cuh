// CIE Lab (D65) -> linear sRGB -> sRGB, and the gamut clamp: dist_colorize.color.lab with its constants as decimals.
#pragma once

struct Rgb {
    float red, green, blue;
};

constexpr int GAMUT_STEPS = 12;
// color.lab allows 1e-4 beyond 0..1 in sRGB; taken to linear light, where no power is needed to decide.
constexpr float LOWEST_LINEAR = -7.73993808e-06f;
constexpr float HIGHEST_LINEAR = 1.0002275f;

__device__ __forceinline__ float lab_f_inverse(float f) {
    return f > 0.2068966f ? f * f * f : (f - 0.137931034f) * 0.12841916f;
}

// Not clipped. The white point is part of the matrix.
__device__ __forceinline__ Rgb linear_from_lab(float level, float a, float b) {
    const float fy = (level + 16.0f) * (1.0f / 116.0f);
    const float x = lab_f_inverse(fy + a * (1.0f / 500.0f)), y = lab_f_inverse(fy),
                z = lab_f_inverse(fy - b * (1.0f / 200.0f));
    return {3.0799803f * x - 1.53715152f * y - 0.542821308f * z, -0.921247752f * x + 1.87599f * y + 0.0452473395f * z,
            0.0528904611f * x - 0.204041338f * y + 1.15123201f * z};
}

__device__ __forceinline__ bool outside_gamut(const Rgb& linear) {
    return fminf(fminf(linear.red, linear.green), linear.blue) < LOWEST_LINEAR ||
           fmaxf(fmaxf(linear.red, linear.green), linear.blue) > HIGHEST_LINEAR;
}

// The colour itself where sRGB can show it, else the same L and hue with as much chroma as it can.
__device__ __forceinline__ Rgb linear_in_gamut(float level, float a, float b) {
    Rgb linear = linear_from_lab(level, a, b);
    if (!outside_gamut(linear)) return linear;
    float inside = 0.0f, beyond = 1.0f;
#pragma unroll 1
    for (int step = 0; step < GAMUT_STEPS; ++step) {
        const float middle = 0.5f * (inside + beyond);
        if (outside_gamut(linear_from_lab(level, a * middle, b * middle)))
            beyond = middle;
        else
            inside = middle;
    }
    return linear_from_lab(level, a * inside, b * inside);
}

// 0..1, clipped; NaN gives 0. x^(1/2.4) as 2^(log2(x) / 2.4): two instructions of the special function unit.
__device__ __forceinline__ float srgb_from_linear(float linear) {
    const float power = exp2f(log2f(fmaxf(linear, 0.0031308f)) * (1.0f / 2.4f));
    return __saturatef(linear > 0.0031308f ? 1.055f * power - 0.055f : 12.92f * linear);
}
