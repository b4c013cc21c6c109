"""Many LoRA adapters on one base model: which of them are in memory, and where.

Every adapter that is being served is in a page of the slab, which has as many numbers as the largest adapter may have;
smaller ones leave the rest unused. A page holds the matrices of all layers one after the other, so that an adapter
comes in by one copy, and the kernels read it where it lies. Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving"
(arXiv:2310.18547); Sheng et al. 2023, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters" (arXiv:2311.03285).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.peft_folder import WEIGHTS, matches
from ..cuda import why_not as why_not_device
from ..inference import variants
from ..integrations.registry import check_module
from ..ops._arguments import FLOAT_DTYPES, check_size, dtype_name, is_number, path_of, refuse
from .batch import Batch, Matrices, Names, Views
from .checkpoint import Layout, LoRACheckpoint, page_size, read_checkpoint
from .layers import is_4bit, is_served_kind, pooled_class, shape_of, why_not


class Memory(NamedTuple):
    """Where a pool's adapters are.

    Attributes:
        slab: bytes of all pages.
        host: bytes of the host tier.
        in_slab, in_host: names, the one that was used last at the end.
    """

    slab: int
    host: int
    in_slab: tuple[str, ...]
    in_host: tuple[str, ...]


class _Page:
    """A row of the slab.

    Attributes:
        users: how many batches under way read it.
        adapter: what new batches find in it; None where it is free, or will be with its last user.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.users = numbers, 0
        self.adapter: _Adapter | None = None
        self.layout: Layout | None = None
        self.views = Views({})


class _Adapter:
    """One version of a named adapter: where it was read, and what of it is in memory."""

    def __init__(self, checkpoint: LoRACheckpoint) -> None:
        self.checkpoint: LoRACheckpoint | None = checkpoint  # in the host tier
        self.folder, self.stamp, self.nbytes = checkpoint.folder, checkpoint.stamp, checkpoint.nbytes
        self.page: _Page | None = None


class AdapterPool:
    """Serves many LoRA adapters on one base model, each sample of a batch with its own.

    ```
    with AdapterPool(model, slots=16, max_rank=64) as pool:
        pool.load("alice", "adapters/alice")
        pool.load("bob", "adapters/bob")
        pool.generate(["alice", None, "bob"], **tokenizer(prompts, return_tensors="pt", padding=True))
        with pool.batch(["alice", None, "bob"]):
            model(**inputs)
    ```

    The model's linear layers are given a class of this package until `close()`, which is one object's class and no
    tensor; outside of a batch they compute what they did. All methods may be called from several threads, while others
    run the model. An adapter that a batch under way uses stays what it is until that batch ends: what `swap`, `evict`
    and `remove` do is for later batches.

    Adapters live in three tiers: pages on the model's device, host memory, and their folders. A batch takes the pages
    of the least recently used adapters for those that it needs; what is in no page any more comes back from host
    memory, or from its folder. `optimize` before or after makes the rest of the model faster as well.

    Args:
        model: a model as transformers loads it, dense or in bitsandbytes' 4 bits, without PEFT's layers. Its parameters
            are neither copied nor moved.
        slots: how many adapters can be served at a time. A page has `max_rank * (N + K)` numbers for each layer.
        max_rank: the largest rank of an adapter.
        target_modules: the layers that adapters may have matrices for, as PEFT names them; by default every linear
            layer but the output layer.
        dtype: of the slab: fp32, bf16 or fp16. Branches are computed in fp32 whatever it is.
        host_bytes: how much host memory adapters may take besides the slab.
        root: the folder that `load` and `swap` may read in; None allows any.
        wait: for how many seconds a batch waits while all pages that it could take are in use.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument that does not fit; a model with PEFT's layers, with no layer to serve, or with one that
            can't be served; it names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int = 8,
        max_rank: int = 64,
        target_modules: str | list[str] = "all-linear",
        dtype: torch.dtype = torch.float32,
        host_bytes: int = 1 << 30,
        root: str | Path | None = None,
        wait: float = 60.0,
    ) -> None:
        check_module(model)
        check_size("slots", slots)
        check_size("max_rank", max_rank)
        if dtype not in FLOAT_DTYPES:
            refuse("dtype", repr(dtype), f"one of {', '.join(map(dtype_name, FLOAT_DTYPES))}")
        if isinstance(host_bytes, bool) or not (isinstance(host_bytes, int) and host_bytes >= 0):
            refuse("host_bytes", repr(host_bytes), "a number of bytes")
        if not (is_number(wait) and wait >= 0):
            refuse("wait", repr(wait), "a number of seconds")
        if root is not None:
            root = path_of("root", root).absolute()
        layers = _find_layers(model, target_modules)
        self.model, self.max_rank, self.dtype, self.host_bytes = model, max_rank, dtype, host_bytes
        self.root = root
        self._wait = wait
        self._layers = {module: name for name, module in layers.items()}
        self._modules = layers
        self._shapes = {name: shape_of(module) for name, module in layers.items()}
        self._device = next(iter(layers.values())).weight.device
        self._slab = torch.zeros(slots, page_size(self._shapes.values(), max_rank), dtype=dtype, device=self._device)
        self._pages = [_Page(row) for row in self._slab]
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()  # the last one was used last
        self._pinned: set[str] = set()
        self._changed = threading.Condition()  # also the lock of all that is above
        self._is_closed = False
        self._classes: dict[Any, Any] = {module: type(module) for module in layers.values()}
        for module, cls in self._classes.items():
            module.__class__ = pooled_class(cls)
            if is_4bit(module):
                module.prepare()

    # ---- Adapters ---------------------------------------------------------------------------------------------------

    def read(self, folder: str | Path) -> LoRACheckpoint:
        """An adapter's numbers in host memory, checked as a whole, for `load` or `swap`.

        Raises:
            FileNotFoundError: a file is not there, or the weights only as a pickle.
            ValueError: a folder outside of `root`; another method than LoRA, or more than it (DoRA, `lora_bias`,
                `modules_to_save`, trained tokens, …); a file that is no safetensors or is cut off; weights for layers
                that are not served, of a rank above `max_rank`, of other shapes or not finite, with a list of these.
        """
        pins = self._device.type == "cuda"
        return read_checkpoint(self._inside(folder), self._shapes, self.max_rank, self.dtype, pins)

    def load(self, name: str, source: str | Path | LoRACheckpoint | None = None) -> None:
        """Adds an adapter, and puts it into a page if one can be had at once.

        Args:
            source: its folder, or what `read` returned; by default the folder of that name in `root`.

        Raises:
            ValueError: a name that is taken, and all that `read` raises. Nothing is changed then.
        """
        if not isinstance(name, str) or not name:
            refuse("name", repr(name), "a text")
        with self._changed:
            self._check_new(name)
        adapter = self._adapter(name, source)
        with self._changed:
            self._check_open()
            self._check_new(name)
            self._enter(name, adapter)

    def swap(self, name: str, source: str | Path | LoRACheckpoint | None = None) -> None:
        """Replaces an adapter by another version; batches under way go on with the one that they began with.

        Raises:
            ValueError: an unknown name, and all that `read` raises. Nothing is changed then.
        """
        with self._changed:
            self._known(name)
        adapter = self._adapter(name, source)
        with self._changed:
            self._check_open()
            self._leave_page(self._known(name))
            self._enter(name, adapter)

    def evict(self, name: str) -> None:
        """Takes an adapter out of its page; it comes back with the next batch that names it.

        Raises:
            ValueError: an unknown name, or one that is pinned.
        """
        with self._changed:
            adapter = self._known(name)
            if name in self._pinned:
                refuse("name", f"{name!r}, which is pinned", "one that is not: unpin it first")
            self._leave_page(adapter)

    def remove(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: an unknown name.
        """
        with self._changed:
            self._leave_page(self._known(name))
            del self._adapters[name]
            self._pinned.discard(name)

    def pin(self, name: str) -> None:
        """Puts an adapter into a page that no other adapter takes.

        Raises:
            ValueError: an unknown name; no page that is not pinned.
            TimeoutError: all pages are in use.
        """
        with self._leased((name,)), self._changed:
            self._known(name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Raises ValueError for an unknown name."""
        with self._changed:
            self._known(name)
            self._pinned.discard(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, the one that was used last at the end."""
        with self._changed:
            return tuple(self._adapters)

    @property
    def memory(self) -> Memory:
        with self._changed:
            in_slab = tuple(name for name, adapter in self._adapters.items() if adapter.page)
            in_host = tuple(name for name, adapter in self._adapters.items() if adapter.checkpoint)
            return Memory(self._slab.numel() * self._slab.element_size(), self._host_bytes(), in_slab, in_host)

    def __repr__(self) -> str:
        slab, host, in_slab, in_host = self.memory
        tiers = f"{len(in_slab)} in {len(self._pages)} pages of the slab, {slab / 1e6:.1f} MB, {len(in_host)} in host "
        return (
            f"AdapterPool({len(self.names)} adapters on {len(self._layers)} layers: {tiers}memory, {host / 1e6:.1f} MB)"
        )

    # ---- Batches ----------------------------------------------------------------------------------------------------

    @contextmanager
    def batch(self, names: Names, *, expand: int = 1) -> Iterator[Batch]:
        """A context in which the model's calls of this thread, or task, have an adapter for each sample.

        Their adapters stay in their pages, unchanged, until it is left.

        Args:
            names: one for each sample of the batch; None for the base alone.
            expand: how many neighbouring rows may stand for a sample, as beams do.

        Raises:
            ValueError: an unknown name; more adapters than there are pages that are not pinned by others; a folder
                that has changed since the adapter was read. The call raises one where x has another number of samples.
            FileNotFoundError: an adapter's folder, which has to be read again, is gone.
            TimeoutError: all pages are in use for too long.
        """
        is_list = isinstance(names, (list, tuple)) and all(name is None or isinstance(name, str) for name in names)
        if not is_list:
            refuse("names", repr(names), "a list with a name or None for each sample")
        check_size("expand", expand)
        with self._leased(names) as views:
            batch = Batch(names, views, self._layers, expand)
            token = variants.current.set(batch)
            try:
                yield batch
            finally:
                variants.current.reset(token)

    def generate(self, names: Names, **inputs: Any) -> Any:
        """What the model's `generate` returns, where each sample has its own adapter, or none; beams have their
        sample's.

        Args:
            names: as `batch` takes them.
            inputs: what `generate` takes.
        """
        config = inputs.get("generation_config") or getattr(self.model, "generation_config", None)
        beams, sequences = (
            inputs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences")
        )
        with self.batch(names, expand=max(beams, sequences)):
            model: Any = self.model
            return model.generate(**inputs)

    # ---- The end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for the batches under way, and gives the layers the classes back that they had.

        Raises:
            TimeoutError: batches are still under way after the pool's `wait`; the pool is then open.
        """
        with self._changed:
            if self._is_closed:
                return
            if not self._changed.wait_for(lambda: not any(page.users for page in self._pages), self._wait):
                raise TimeoutError(f"batches are under way, still after {self._wait} s")
            self._is_closed = True
            for module, cls in self._classes.items():
                module.forget()
                module.__class__ = cls
            self._adapters.clear()
            self._pinned.clear()
            self._pages, self._slab = [], self._slab[:0].clone()
            self._changed.notify_all()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- Folders and leases, which take the lock themselves ----------------------------------------------------------

    def _inside(self, folder: str | Path) -> Path:
        path = Path(self.root or "", path_of("folder", folder)).absolute()
        if self.root is not None and not path.resolve().is_relative_to(self.root.resolve()):
            refuse("folder", repr(str(folder)), f"one inside of {self.root}")
        return path

    def _adapter(self, name: str, source: str | Path | LoRACheckpoint | None) -> _Adapter:
        if source is None:
            if self.root is None:
                refuse("source", "None", "a folder, as the pool has no root")
            source = name
        checkpoint = source if isinstance(source, LoRACheckpoint) else self.read(source)
        shapes = {part.layer: self._shapes.get(part.layer) for part in checkpoint.layout}
        fits = all(shapes.values()) and checkpoint.numbers.numel() <= self._slab.shape[1]
        if checkpoint.numbers.dtype is not self.dtype or not fits:
            refuse("source", "what another pool's read returned", "what this one's did")
        return _Adapter(checkpoint)

    @contextmanager
    def _leased(self, names: Names) -> Iterator[dict[str, Views]]:
        """The views of some adapters' pages, which stay theirs within it."""
        distinct = tuple(dict.fromkeys(name for name in names if name is not None))
        pages = self._lease(distinct)
        try:
            yield {name: page.views for name, page in zip(distinct, pages, strict=True)}
        finally:
            with self._changed:
                for page in pages:
                    page.users -= 1
                self._changed.notify_all()

    def _lease(self, names: tuple[str, ...]) -> list[_Page]:
        """The pages of some adapters, with one more user each; for as long as the pool may wait for them."""
        end = time.monotonic() + self._wait
        read: dict[_Adapter, LoRACheckpoint] = {}
        while True:
            with self._changed:
                self._check_open()
                adapters = [self._known(name) for name in names]
                self._check_pages(names)
                for name, adapter in zip(names, adapters, strict=True):
                    self._adapters.move_to_end(name)
                    if adapter.checkpoint is None and adapter in read:
                        adapter.checkpoint = read[adapter]
                unread = [adapter for adapter in adapters if adapter.page is None and adapter.checkpoint is None]
                pages = None if unread else self._take_pages(names, adapters)
                if pages is not None:
                    return pages
                if not unread and not self._changed.wait(max(end - time.monotonic(), 0)) and time.monotonic() >= end:
                    raise TimeoutError(f"names: the pages for {names} are in use, still after {self._wait} s")
            for adapter in unread:
                read[adapter] = self._read_again(adapter)

    def _read_again(self, adapter: _Adapter) -> LoRACheckpoint:
        checkpoint = self.read(adapter.folder)
        if checkpoint.stamp != adapter.stamp:
            path = adapter.folder / WEIGHTS
            raise ValueError(
                f"{path}: got a file that has changed since it was loaded, wanted the same; swap() loads it"
            )
        return checkpoint

    # ---- Pages, for callers that hold the lock -----------------------------------------------------------------------

    def _enter(self, name: str, adapter: _Adapter) -> None:
        """Gives a name to an adapter whose numbers are in host memory."""
        self._adapters[name] = adapter
        self._adapters.move_to_end(name)
        if (free := self._free_pages(1, {name})) is not None:
            self._put(adapter, free[0])
        self._trim()
        self._changed.notify_all()

    def _check_pages(self, names: tuple[str, ...]) -> None:
        pinned = sum(self._adapters[name].page is not None for name in self._pinned - set(names))
        if len(names) > len(self._pages) - pinned:
            wanted = f"at most {len(self._pages) - pinned}: the pool has {len(self._pages)} pages"
            refuse("names", f"{len(names)} adapters", wanted + f", {pinned} of them pinned" * (pinned > 0))

    def _take_pages(self, names: tuple[str, ...], adapters: list[_Adapter]) -> list[_Page] | None:
        """The adapters' pages, with one more user each; None where others use too many."""
        missing = [adapter for adapter in adapters if adapter.page is None]
        free = self._free_pages(len(missing), set(names))
        if free is None:
            return None
        for adapter, page in zip(missing, free, strict=True):
            self._put(adapter, page)
        pages = [adapter.page for adapter in adapters if adapter.page is not None]
        for page in pages:
            page.users += 1
        self._trim()
        return pages

    def _free_pages(self, count: int, keep: set[str]) -> list[_Page] | None:
        """So many pages that are free, also by evictions; None if there are not enough."""
        free = [page for page in self._pages if not page.users and page.adapter is None]
        for name, adapter in self._adapters.items():
            if len(free) >= count:
                break
            if adapter.page and not adapter.page.users and name not in self._pinned and name not in keep:
                free.append(adapter.page)
        if len(free) < count:
            return None
        for page in free[:count]:
            if page.adapter is not None:
                self._leave_page(page.adapter)
        return free[:count]

    def _put(self, adapter: _Adapter, page: _Page) -> None:
        """Copies an adapter into a page."""
        checkpoint = adapter.checkpoint
        assert checkpoint is not None and not page.users
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels of batches that have ended may still be reading the page
        with torch.no_grad():
            page.numbers[: checkpoint.numbers.numel()].copy_(checkpoint.numbers)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # other threads may have other streams
        if page.layout != checkpoint.layout:  # else what was packed for the page holds
            page.layout, page.views = checkpoint.layout, self._views(page.numbers, checkpoint.layout)
        page.adapter, adapter.page = adapter, page

    def _views(self, numbers: Tensor, layout: Layout) -> Views:
        layers = {}
        for layer, rank, scaling, begin, middle in layout:
            n, k = self._shapes[layer]
            lora_A = numbers.as_strided((rank, k), (k, 1), numbers.storage_offset() + begin)
            lora_B = numbers.as_strided((n, rank), (rank, 1), numbers.storage_offset() + middle)
            layers[self._modules[layer]] = Matrices(lora_A, lora_B, scaling)
        return Views(layers)

    def _leave_page(self, adapter: _Adapter) -> None:
        """Has new batches no longer find an adapter in its page, which is free with its last user."""
        if adapter.page is not None:
            adapter.page.adapter = None
            adapter.page = None
        self._changed.notify_all()

    def _trim(self) -> None:
        """Leaves to their folders what is too much for the host tier."""
        excess = self._host_bytes() - self.host_bytes
        for adapter in self._adapters.values():
            if excess <= 0:
                return
            if adapter.checkpoint is not None:
                adapter.checkpoint = None
                excess -= adapter.nbytes

    def _host_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values() if adapter.checkpoint is not None)

    def _known(self, name: str) -> _Adapter:
        self._check_open()
        adapter = self._adapters.get(name)
        if adapter is None:
            refuse("name", repr(name), f"one that was loaded: {', '.join(map(repr, self._adapters)) or 'none was'}")
        return adapter

    def _check_new(self, name: str) -> None:
        if name in self._adapters:
            refuse("name", f"{name!r}, which is taken", "a new one: swap() replaces an adapter")

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the pool was closed")


def _find_layers(model: nn.Module, target_modules: str | list[str]) -> dict[str, Any]:
    """The layers to serve, by their names in the model."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    by_name = {name: module for name, module in model.named_modules() if is_served_kind(module)}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            kind = f"a {type(module).__name__} on a base layer, {name!r}"
            refuse("model", f"one with {kind}", "the model without adapters in it, as PEFT's unload() returns it")
    if target_modules == "all-linear":
        layers = {name: module for name, module in by_name.items() if module is not head}
    elif isinstance(target_modules, str):
        layers = {name: module for name, module in by_name.items() if matches(target_modules, name)}
    else:
        if not isinstance(target_modules, Collection):
            refuse("target_modules", repr(target_modules), "a text or a list of texts")
        ends = tuple(f".{end}" for end in target_modules)
        layers = {name: module for name, module in by_name.items() if f".{name}".endswith(ends)}
    if not layers:
        refuse("target_modules", repr(target_modules), f"what names some linear layers of a {type(model).__name__}")
    devices = {module.weight.device for module in layers.values()}
    if len(devices) > 1 or (device := devices.pop()).type == "meta":
        refuse("model", "layers on several devices, or on none", "all of them on one")
    if device.type != "cpu" and (reason := why_not_device(device)):
        refuse("model", f"one on {device}: {reason}", "one where the kernels run")
    for name, module in layers.items():
        if reason := why_not(module):
            refuse("model", f"{name} with {reason}", "layers that can be served")
    return layers
