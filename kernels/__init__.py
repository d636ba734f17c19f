"""The numerics of numlstm: cell equations, their derivation, and the kernels made from them. Knows arrays, never layers."""
