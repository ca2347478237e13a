"""The kernels: what runs on the GPU, without a word of torch."""
