"""A cache line of floats as one value in Numba: 16 float32 or 8 float64, which LLVM keeps in vector registers.

Numba leaves vectorisation to LLVM's guess, and a loop with a condition per cache line defeats it. With these values
the loop says what it means, for any instruction set: LLVM splits a line over as many registers as the machine needs.
Numba's file cache does not look in here: after a change, touch the modules that use it.
"""

from __future__ import annotations

import operator
import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from . import LINE_BYTES


class _Vector(types.Type):
    def __init__(self, scalar):
        self.scalar, self.lanes = scalar, LINE_BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"{scalar}x{self.lanes}")


class _Mask(types.Type):
    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"maskx{lanes}")


def _llvm(scalar):
    return ir.VectorType(
        ir.FloatType() if scalar.bitwidth == 32 else ir.DoubleType(), LINE_BYTES * 8 // scalar.bitwidth
    )


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _llvm(kind.scalar))


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


def _call(builder, name, result, args, **options):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, **options)


def _suffix(kind):
    """How LLVM names the variant of an intrinsic for this vector type."""
    return f"v{kind.count}{'f32' if isinstance(kind.element, ir.FloatType) else 'f64'}"


def _of_vector(name):
    """The LLVM intrinsic `name` applied to vectors of one type."""

    def codegen(context, builder, signature, args):
        return _call(builder, f"llvm.{name}.{_suffix(args[0].type)}", args[0].type, args)

    return codegen


def _method(name, *before):
    def codegen(context, builder, signature, args):
        return getattr(builder, name)(*before, *args)

    return codegen


def _operator(symbol, kind, codegen, result=None):
    @intrinsic
    def apply(context, a, b):
        return (result(a) if result else a)(a, b), codegen

    @overload(symbol)
    def dispatch(a, b):
        if isinstance(a, kind) and a == b:
            return lambda a, b: apply(a, b)
        return None


_operator(operator.add, _Vector, _method("fadd"))
_operator(operator.sub, _Vector, _method("fsub"))
_operator(operator.mul, _Vector, _method("fmul"))
_operator(operator.truediv, _Vector, _method("fdiv"))
# Every comparison is true where a NaN takes part, so that a NaN is never taken for a zero and left out.
for _symbol, _sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.ne, "!=")):
    _operator(_symbol, _Vector, _method("fcmp_unordered", _sign), lambda a: _Mask(a.lanes))
_operator(operator.or_, _Mask, _method("or_"))
_operator(operator.and_, _Mask, _method("and_"))


@intrinsic
def splat(context, value):
    """The vector that holds `value` in every lane."""

    def codegen(context, builder, signature, args):
        kind = _llvm(signature.args[0])
        undefined = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
        return builder.shuffle_vector(first, undefined, everywhere)

    return _Vector(value)(value), codegen


@intrinsic
def select(context, mask, a, b):
    """`a` where `mask`, `b` elsewhere."""
    return a(mask, a, b), _method("select")


@intrinsic
def clamp(context, x, low, high):
    """x, but not below `low` and not above `high`; a NaN stays one. One instruction for each side."""

    def codegen(context, builder, signature, args):
        x, low, high = args
        x = builder.select(builder.fcmp_ordered(">", low, x), low, x)
        return builder.select(builder.fcmp_ordered("<", high, x), high, x)

    return x(x, low, high), codegen


@intrinsic
def fma(context, a, b, c):
    """a·b + c with one rounding, as torch's own CPU kernels compute it."""
    return a(a, b, c), _of_vector("fma")


@intrinsic
def sqrt(context, a):
    return a(a), _of_vector("sqrt")


@intrinsic
def some(context, mask):
    """1 if any lane of the mask is set, else 0."""

    def codegen(context, builder, signature, args):
        any_lane = _call(builder, f"llvm.vector.reduce.or.v{args[0].type.count}i1", ir.IntType(1), args)
        return builder.zext(any_lane, ir.IntType(64))

    return types.int64(mask), codegen


def _data(context, builder, kind, array):
    return cgutils.create_struct_proxy(kind)(context, builder, array).data


def _at(context, builder, signature, args):
    place = builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]])
    return builder.bitcast(place, _llvm(signature.args[0].dtype).as_pointer())


def _there_or_spare(context, builder, signature, args):
    """The address array[index] where flag is −1, that of `spare` where it is 0, without a branch."""
    array, index, flag, spare = args[:4]
    word = ir.IntType(64)
    there = builder.ptrtoint(builder.gep(_data(context, builder, signature.args[0], array), [index]), word)
    spare = builder.ptrtoint(_data(context, builder, signature.args[3], spare), word)
    flag = builder.sext(flag, word) if flag.type.width < 64 else flag
    place = builder.xor(spare, builder.and_(builder.xor(spare, there), flag))
    return builder.inttoptr(place, _llvm(signature.args[0].dtype).as_pointer())


def _prefetch(context, builder, place):
    write, keep, data = (ir.Constant(ir.IntType(32), n) for n in (1, 3, 1))
    place = builder.bitcast(place, cgutils.voidptr_t)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, write, keep, data])
    return context.get_dummy_value()


def _align(signature):
    return signature.args[0].dtype.bitwidth // 8


@intrinsic
def load(context, array, index):
    """array[index : index + lanes]."""

    def codegen(context, builder, signature, args):
        return builder.load(_at(context, builder, signature, args), align=_align(signature))

    return _Vector(array.dtype)(array, index), codegen


@intrinsic
def store(context, array, index, value):
    """array[index : index + lanes] = value."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _at(context, builder, signature, args), align=_align(signature))
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


# Whether a line is wanted is as good as random, and a branch on it would be mispredicted half the time, each time
# waiting for memory. So the three that follow always access a line: the wanted one, or a spare one that is in cache.


@intrinsic
def load_if(context, array, index, flag, spare):
    """array[index : index + lanes] where `flag` is −1, the first lanes of `spare` where it is 0."""

    def codegen(context, builder, signature, args):
        return builder.load(_there_or_spare(context, builder, signature, args), align=_align(signature))

    return _Vector(array.dtype)(array, index, flag, spare), codegen


@intrinsic
def store_if(context, array, index, flag, spare, value):
    """array[index : index + lanes] = value where `flag` is −1; `spare` is overwritten where it is 0."""

    def codegen(context, builder, signature, args):
        builder.store(args[4], _there_or_spare(context, builder, signature, args), align=_align(signature))
        return context.get_dummy_value()

    return types.void(array, index, flag, spare, value), codegen


@intrinsic
def prefetch_if(context, array, index, flag, spare):
    """Ask for the line of array[index] where `flag` is −1."""

    def codegen(context, builder, signature, args):
        return _prefetch(context, builder, _there_or_spare(context, builder, signature, args))

    return types.void(array, index, flag, spare), codegen


@intrinsic
def denormals_are_zero(context, word):
    """Set this thread's control word for numbers below the normal range; returns the old one.

    `word`: −1 treats them as zero, for arithmetic on them is many times slower; else a word to put back. On other
    processors than x86 nothing happens.
    """

    def codegen(context, builder, signature, args):
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return args[0]
        kind = ir.IntType(32)
        place = cgutils.alloca_once(builder, kind)
        address = builder.bitcast(place, cgutils.voidptr_t)
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [address])
        old = builder.load(place)
        wanted = builder.trunc(args[0], kind)
        zeros = builder.or_(old, ir.Constant(kind, 0x8040))  # flush results to zero, take inputs as zero
        builder.store(builder.select(builder.icmp_signed("==", wanted, ir.Constant(kind, -1)), zeros, wanted), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [address])
        return builder.zext(old, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def pointer(context, address):
    """An address as a pointer, for numba.carray."""
    return types.voidptr(address), lambda context, builder, signature, args: builder.inttoptr(
        args[0], cgutils.voidptr_t
    )


@intrinsic
def claim(context, counter):
    """counter[0], and one more for the next who asks, whichever thread that is."""

    def codegen(context, builder, signature, args):
        data = _data(context, builder, signature.args[0], args[0])
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def prefetch(context, array, index):
    """Ask for the line of array[index]; beyond the end is no harm."""

    def codegen(context, builder, signature, args):
        return _prefetch(context, builder, _at(context, builder, signature, args))

    return types.void(array, index), codegen


@intrinsic
def count(context, mask):
    """How many lanes of the mask are set."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], ir.IntType(args[0].type.count))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.int64(mask), codegen


@intrinsic
def total(context, a):
    """The sum of all lanes, in whatever order is fastest."""

    def codegen(context, builder, signature, args):
        kind = args[0].type
        start = ir.Constant(kind.element, -0.0)
        name = f"llvm.vector.reduce.fadd.{_suffix(kind)}"
        return _call(builder, name, kind.element, [start, args[0]], fastmath=("reassoc",))

    return a.scalar(a), codegen
