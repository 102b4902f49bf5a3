"""CUDA kernels, compiled for the GPU at hand by NVRTC. Each module: a launcher, and the same in plain PyTorch."""
