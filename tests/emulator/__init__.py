"""Runs the CUDA sources of kernels/ on the CPU, from the same text, with the real launch configuration.

`compiler` builds a .cu with the host C++ compiler against `cuda_names.h` and `runtime.cpp`; `cupy_standin` puts that
in the place of CuPy, so that the whole `--gpu` code path runs where no GPU is. It proves meaning, memory safety and the
absence of races; it says nothing about speed.
"""
