"""A device made of paper: CPU tensors in wrappers, so that no hardware is needed to see what a GPU would object to.

    with paper_device() as paper:
        x = torch.rand(4, 3, 8, 8).to(DEVICE); ...
        paper.waits   # Counter of (what, where): where the host waits for the device
        paper.bytes   # Counter of where: what crosses to the device

Mixing its tensors with the CPU's raises, as on a GPU. It is built on PyTorch's Python backend, of which a process has
one, so it is registered when the first `paper_device()` is entered, and looks unavailable to others outside of it.

What it cannot show: races (everything happens at once, in order), memory that runs out, kernels that a device lacks.
Its random numbers come from the CPU's generator, so that runs can be compared."""
import contextlib
import functools
import sys
from collections import Counter, OrderedDict

import fastai.torch_core # makes `torch.as_subclass` # noqa: F401
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = 'paper'
DEVICE = NAME + ':0'
current = None # the `PaperDevice` that is entered

def missing():
    "Why there is no such device here; '' where there is one"
    try: from torch.utils.backend_registration import _setup_privateuseone_for_python_backend # noqa: F401
    except ImportError: return f"PyTorch {torch.__version__} has no devices made in Python (2.11 and newer have)"
    return ''

# What is counted

# operations whose result, or its size, the host must know
_waiting = {'_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', 'bincount', 'repeat_interleave',
    '_unique2', 'unique_dim', 'unique_consecutive', '_linalg_check_errors'}
_indexing = {'index', 'index_put', 'index_put_', '_index_put_impl_'}
_may_mix = {'_to_copy', 'copy_', *_indexing}
# kornia 0.9 copies its parameters without blocking to CUDA alone
_kornia_copy = 'kornia/core/utils.py', '_to_device_nonblocking'

def _stack():
    "(file, line, function) from the innermost on, without PyTorch, this file, and what only passes a call on"
    frame = sys._getframe(1)
    while frame is not None:
        file,name = frame.f_code.co_filename,frame.f_code.co_name
        if '/torch/' not in file and file != __file__ and name != '__torch_function__': yield file,frame.f_lineno,name
        frame = frame.f_back

def _where():
    "The innermost line outside of PyTorch and this file, and the innermost of our library"
    frames = list(_stack())
    ours = [f for f in frames if 'clae_fastai/' in f[0] and f[2] != 'one_batch'] # which is around all that fastai does
    places = ['/'.join(file.split('/')[-2:]) + f':{line} {name}' for file,line,name in (frames[0], *ours[:1])]
    return ' <- '.join(dict.fromkeys(places))

def _is_kornias_copy():
    file,_,name = next(_stack())
    return file.endswith(_kornia_copy[0]) and name == _kornia_copy[1]

def _is_paper(device): return device is not None and torch.device(device).type == NAME

def _count(name, args, kwargs, on_device, on_cpu):
    "Count the waits and bytes of one operation; does its result lie on the CPU?"
    def wait(what):
        if current is not None: current.waits[what, _where()] += 1
    def cross(*tensors):
        if current is not None: current.bytes[_where()] += sum(t.numel()*t.element_size() for t in tensors)
    if not on_device and not _is_paper(kwargs.get('device')): return True
    if name in _waiting and on_device: wait(name)
    if name in _indexing:
        indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
        if from_cpu := [i for i in indices if not isinstance(i, PaperTensor)]:
            wait('index from the CPU')
            cross(*from_cpu)
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices): wait('mask as index')
    if name == '_to_copy':
        source,to = args[0],kwargs.get('device')
        if isinstance(source, PaperTensor):
            leaves = to is not None and not _is_paper(to)
            if leaves: wait('copy to the CPU') # one that does not block is no better: the host would read half of it
            return leaves
        cross(source)
        if not kwargs.get('non_blocking') and not _is_kornias_copy(): wait('blocking copy to the device')
    if name == 'copy_' and on_cpu:
        to,source = args[:2]
        if not isinstance(to, PaperTensor):
            wait('copy to the CPU')
            return True
        cross(source)
        if not (kwargs.get('non_blocking') or args[2:] and args[2]): wait('blocking copy to the device')
    return False

# Its tensors

_data = torch.Tensor.data

class PaperTensor(torch.Tensor):
    "Says that it is on the paper device; its numbers are in `raw`, on the CPU"
    @staticmethod
    def __new__(cls, raw):
        res = torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(),
            storage_offset=raw.storage_offset(), dtype=raw.dtype, layout=raw.layout, device=DEVICE)
        res.raw = raw
        return res

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, _tensors((args, kwargs)))

    def _set_data(self, new):
        _data.__set__(self, new)
        self.raw = new.raw
    data = property(lambda self: _data.__get__(self), _set_data)

    # by these, `Module.to` exchanges a parameter as a whole, and does not keep its `raw`
    def __tensor_flatten__(self): return ['raw'],None
    @staticmethod
    def __tensor_unflatten__(inner, *_): return PaperTensor(inner['raw'])

    def set_meta(self, x, as_copy=False):
        "fastai's, which gives a tensor all attributes of another"
        self.__dict__ = {**getattr(x, '__dict__', {}), 'raw': self.raw}

    def tolist(self): return self.cpu().tolist()
    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
    def __array__(self, *_, **__): return self.numpy()
    def __format__(self, spec): return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)
    def __repr__(self, **_): return f"{self.cpu()!r}, on {DEVICE}"
    def __deepcopy__(self, memo):
        res = self.detach().clone().requires_grad_(self.requires_grad)
        vars(res).update({k: v for k,v in vars(self).items() if k != 'raw'}) # that it is a parameter, for one
        return memo.setdefault(id(self), _of_kind(res, type(self)))
    def __reduce_ex__(self, proto):
        "As PyTorch pickles tensors of devices that it knows little of, so that `torch.load` trusts it"
        if type(self) is PaperTensor and getattr(self, '_is_param', False):
            return torch._utils._rebuild_parameter,(self.detach(), self.requires_grad, OrderedDict())
        build = torch._utils._rebuild_device_tensor_from_cpu_tensor
        args = self.raw,self.dtype,DEVICE,self.requires_grad
        return (build,args) if type(self) is PaperTensor else (_rebuild_kind,(build, args, self._plain))
    _plain = torch.Tensor # what it would be on another device

def _rebuild_kind(build, args, kind): return build(*args).as_subclass(kind)

class _Kind(PaperTensor):
    "Base of the paper tensors that stay of a kind, as fastai's do"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.Tensor.__torch_function__.__func__(cls, func, types, args, kwargs)

@functools.cache
def _paper_kind(kind):
    "Class of the paper tensors that are fastai's `kind` as well"
    if issubclass(kind, PaperTensor): return kind
    if kind in (torch.Tensor, torch.nn.Parameter): return PaperTensor
    own = {name: vars(PaperTensor)[name] for name in ('__repr__','__reduce_ex__')} # before fastai's
    name = 'Paper' + kind.__name__
    res = type(name, (kind, _Kind), dict(own, _plain=kind, __module__=__name__))
    globals()[name] = res # where pickles look for it
    return res

def _of_kind(t, kind):
    "Make `t`, which nobody else has, a tensor of this kind"
    t.__class__ = _paper_kind(kind)
    return t

def _map(f, o):
    "`f` of all that stands in tuples, lists and dictionaries; quicker than PyTorch's `tree_map`"
    if isinstance(o, (tuple,list)): return type(o)([_map(f, x) for x in o])
    return {k: _map(f, x) for k,x in o.items()} if isinstance(o, dict) else f(o)

def _tensors(o):
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): o = o.values()
    elif not isinstance(o, (tuple,list)): return []
    return [t for x in o for t in _tensors(x)]

def _run(func, args, kwargs, tensors):
    name = func._schema.name.partition('::')[2]
    on_device = [t for t in tensors if isinstance(t, PaperTensor)]
    on_cpu = [t for t in tensors if not isinstance(t, PaperTensor)]
    mixed = name not in _may_mix and on_device and any(t.ndim for t in on_cpu) # a number may come from the CPU
    if mixed or name in _indexing and not isinstance(args[0], PaperTensor):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, and there are "
            f"{[tuple(t.shape) for t in on_device]} on {DEVICE}, {[tuple(t.shape) for t in on_cpu]} on the CPU, "
            f"{_where()}")
    stays = not _count(name, args, kwargs, on_device, on_cpu)
    def _raw(o):
        if isinstance(o, PaperTensor): return o.raw
        return torch.device('cpu') if isinstance(o, torch.device) and o.type == NAME else o
    plain = {k: False if k in ('pin_memory','non_blocking') else v for k,v in kwargs.items()}
    out = func(*_map(_raw, args), **_map(_raw, plain))
    if not stays: return out
    own = {id(t.raw): t for t in on_device} # an operation in place returns its own argument
    def _wrap(o):
        if not isinstance(o, torch.Tensor): return o
        mine = own.get(id(o))
        if mine is not None and (mine.shape, mine.stride()) == (o.shape, o.stride()): return mine
        return PaperTensor(o)
    return _map(_wrap, out)

def _as_subclass(t, kind):
    "`torch.as_subclass`, which fastai's is made of: PyTorch gives a wrapper no further class"
    if not isinstance(t, PaperTensor): return _torch_as_subclass(t, getattr(kind, '_plain', kind))
    with torch._C.DisableTorchFunctionSubclass(): return _of_kind(t.view_as(t), kind)

_torch_as_subclass = torch.as_subclass

# Its generators, autocast, and registration

class PaperGenerator(torch.Generator):
    "Takes the place of `torch.Generator`: the paper device has some, too"
    def __new__(cls, device='cpu'):
        if not _is_paper(device): return _Generator(device)
        return super().__new__(cls)
    device = property(lambda self: torch.device(DEVICE))

_Generator = torch.Generator

def _copy_from(source, to, non_blocking=False):
    _count('copy_', (to, source, non_blocking), {}, [to], [source])
    to.raw.copy_(source)
    return to

def _lower_precision(op):
    "`op` as autocast has it, in the low precision"
    def _cast(o, dtype):
        if isinstance(o, torch.Tensor) and o.dtype == torch.float32: return o.to(dtype)
        return o
    def _autocast(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        with torch.autocast(NAME, enabled=False): return op(*_map(lambda o: _cast(o, dtype), args), **kwargs)
    return _autocast

_libraries = [] # PyTorch forgets what is in a library that nobody holds

@functools.cache
def _register():
    from torch.utils import backend_registration as backends
    class Module(backends._DummyBackendModule):
        "`torch.paper`"
        def is_available(self): return current is not None
        def device_count(self): return int(current is not None)
        def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
        def is_bf16_supported(self): return True
        def get_rng_state(self, *_): return torch.get_rng_state()
        def set_rng_state(self, state, *_): torch.set_rng_state(state)
        def synchronize(self, *_): pass
    class Hook(backends._DummyPrivateUse1Hook):
        def is_available(self): return current is not None
        def has_primary_context(self, dev_id): return current is not None
    # at its first use autograd makes a thread for each device that there is, and then no forked process could use it
    torch.ones(1, requires_grad=True).sum().backward()
    backends._setup_privateuseone_for_python_backend(NAME, Module(), Hook())
    rest,lower = (torch.library.Library(o, 'IMPL', 'AutocastPrivateUse1') for o in ('_','aten'))
    rest.fallback(torch.library.fallthrough_kernel)
    for name in ('conv2d','linear','matmul'): lower.impl(name, _lower_precision(getattr(torch.ops.aten, name)))
    plain = torch.library.Library('aten', 'IMPL', 'PrivateUse1') # for `torch.tensor(..., device=)`, which no mode sees
    def _empty(size, stride, dtype=None, **_): return PaperTensor(torch.empty_strided(size, stride, dtype=dtype))
    plain.impl('empty_strided', _empty)
    plain.impl('_copy_from', _copy_from)
    _libraries.extend((rest, lower, plain))
    # `torch.load`'s storages are the CPU's, whatever device they are for
    def _restore(storage, location): return storage if location.startswith(NAME) else None
    torch.serialization.register_package(0, lambda _: None, _restore)

class PaperDevice(TorchDispatchMode):
    "While it lasts, there is a device of this name"
    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self): "Begin to count anew"; self.waits,self.bytes = Counter(),Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs,name = kwargs or {},func._schema.name
        if name == 'aten::is_pinned': return False
        if name == 'aten::_pin_memory': return args[0].clone()
        tensors = _tensors((args, kwargs))
        ours = _is_paper(kwargs.get('device')) or any(isinstance(t, PaperTensor) for t in tensors)
        return _run(func, args, kwargs, tensors) if ours else func(*args, **kwargs)

@contextlib.contextmanager
def paper_device():
    "The device, for as long as the context lasts; nothing of it is seen outside"
    global current
    _register()
    exchanged = dict(Generator=PaperGenerator, as_subclass=_as_subclass)
    before = {name: getattr(torch, name) for name in exchanged}
    # backward in this thread: autograd has none for this device, and the stack shall tell who waits
    with torch.autograd.set_multithreading_enabled(False), PaperDevice() as current:
        for name,new in exchanged.items(): setattr(torch, name, new)
        try: yield current
        finally:
            current = None
            for name,old in before.items(): setattr(torch, name, old)
