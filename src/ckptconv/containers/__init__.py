"""File formats as bytes: where the tensors of a file lie, and the layout of a file that will be written.

Readers hand out `lazy` tensors and read only headers; `plan` functions fix every offset before the first byte, so
that tensor data can be written in any order. No module here knows names, cuts, ranks or models, and none imports
torch or numpy.
"""
