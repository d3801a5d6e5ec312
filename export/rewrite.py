"""Rewrites of OpenVINO graphs to forms that its CPU kernels run faster, with the same results but for rounding."""

from __future__ import annotations

from typing import Any

import numpy as np


def fold_upsampling(model: Any) -> int:
    """Every nearest upsampling by 2 with a 3x3 convolution behind it, into one transposed convolution: 4/9 of the work.

    An output pixel sees 2x2 pixels of the map before upsampling; taps that fall on the same one are summed. Returns how
    many there were.
    """
    from openvino import opset13 as ops

    found = 0
    for conv in model.get_ordered_ops():
        if conv.get_type_name() != "Convolution" or not _doubles(conv.input_value(0).get_node()):
            continue
        weight, plan = _constant(conv.input_value(1).get_node()), conv.get_attributes()
        plain = all(list(plan[key]) == [1, 1] for key in ("strides", "dilations", "pads_begin", "pads_end"))
        if weight is None or weight.shape[2:] != (3, 3) or not plain:
            continue
        turned = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
        taps = np.zeros((*turned.shape[:2], 4, 4), np.float32)
        for row, column in np.ndindex(2, 2):
            taps[:, :, row : row + 3, column : column + 3] += turned
        before = conv.input_value(0).get_node().input_value(0)
        folded = ops.convolution_backprop_data(before, ops.constant(taps), [2, 2], None, [1, 1], [1, 1])
        conv.output(0).replace(folded.output(0))
        found += 1
    return found


def _doubles(node: Any) -> bool:
    """Whether ``node`` repeats every pixel of a map twice in both directions."""
    if node.get_type_name() != "Interpolate":
        return False
    plan, before, after = node.get_attributes(), node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    sides = [(before[axis], after[axis]) for axis in (2, 3)]
    fixed = len(before) == 4 and all(a.is_static and b.is_static for a, b in sides)
    kinds = (plan["mode"], plan["coordinate_transformation_mode"], plan["nearest_mode"])
    return (
        fixed
        and kinds == ("nearest", "asymmetric", "floor")
        and all(2 * a.get_length() == b.get_length() for a, b in sides)
    )


def _constant(node: Any) -> Any:
    """The numbers of a constant, or None."""
    return node.get_data() if node.get_type_name() == "Constant" else None


def norm_by_channels(model: Any) -> int:
    """Every group normalisation of a map, into sums by channel, so that maps stay in the layout of the convolutions.

    OpenVINO's own way views a group as a row, for which maps are put in order and back. Squares are summed of what the
    mean was taken from: no digits are lost. Returns how many there were.
    """
    from openvino import opset13 as ops

    found = 0
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN" or norm.input_value(0).get_node().get_type_name() != "Reshape":
            continue
        x, viewed, back = norm.input_value(0).get_node().input_value(0), norm.get_output_partial_shape(0), _user(norm)
        for kind, idle in (("Multiply", 1), ("Add", 0)):  # as an instance norm without weights is written
            if back is not None and back.get_type_name() == kind and _is_all(back.input_value(1).get_node(), idle):
                back = _user(back)
        shape = x.get_partial_shape()
        if len(shape) != 4 or shape[1].is_dynamic or len(viewed) != 3 or viewed[1].is_dynamic:
            continue
        if back is None or back.get_type_name() != "Reshape" or len(back.get_output_partial_shape(0)) != 4:
            continue
        groups = viewed[1].get_length()
        size = shape[1].get_length() // groups
        means = ops.constant(np.kron(np.eye(groups), np.full((size, size), 1 / size)).astype(np.float32))  # [C, C]

        def by_group(values: Any, means: Any = means) -> Any:
            """Means [B, C, 1, 1] over each channel's group."""
            of_channels = ops.reduce_mean(values, ops.constant([2, 3]), False)
            return ops.reshape(ops.matmul(of_channels, means, False, False), ops.constant([0, 0, 1, 1]), True)

        centred = ops.subtract(x, by_group(x))
        eps = ops.constant(np.float32(norm.get_attributes()["eps"]))
        std = ops.sqrt(ops.add(by_group(ops.multiply(centred, centred)), eps))
        scaled = ops.multiply(centred, ops.divide(ops.constant(np.float32(1)), std))
        back.output(0).replace(scaled.output(0))
        found += 1
    return found


def _user(node: Any) -> Any:
    """The one node that reads the values of ``node``, or None."""
    users = [port.get_node() for port in node.output(0).get_target_inputs()]
    readers = [user for user in users if user.get_type_name() != "ShapeOf"]
    return readers[0] if len(readers) == 1 else None


def _is_all(node: Any, number: float) -> bool:
    """Whether ``node`` is a constant, perhaps viewed in another shape, whose every value is ``number``."""
    while node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool((node.get_data() == number).all())
