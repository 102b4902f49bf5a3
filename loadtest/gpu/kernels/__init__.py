"""Each kernel beside the library call and its bound, on the GPU at hand."""
