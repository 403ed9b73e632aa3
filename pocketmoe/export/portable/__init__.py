"""A bundle as one ONNX model for any stock ONNX Runtime.

conditional.py  a layer's experts inside that graph, by If or QMoE, computed only when routed to
joined.py       the segments as one graph again, in operators that onnx knows
portable.py     bundle in, one ONNX model with external data out
qmoe.py         which experts QMoE computes, known by what their gate computes
"""
