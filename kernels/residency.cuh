// How many blocks of 256 threads a multiprocessor must be able to hold: bounds the registers of a thread (40 from sm_80
// on, 64 on sm_75). Three quarters of the threads of sm_80, 90 and 100, all of sm_75, 86, 89 and 120.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int RESIDENT = 4;
#else
constexpr int RESIDENT = 6;
#endif
