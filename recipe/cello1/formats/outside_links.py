"""What an expression file takes from outside itself: refused, since it could be any file of this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_REMEDY = "copy the data into the file, with anndata for example; a file from a stranger may be an attack"


class BadFileError(ValueError):
    """A file that cannot be used: ``reason`` says what is wrong, ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def refuse_outside_links(path: str | Path) -> None:
    """Raise :class:`BadFileError` if a store (a folder) or an HDF5 file reads anything that lies elsewhere."""
    path = Path(path)
    if path.is_dir():
        _check_folder(path)
    elif path.exists() and not path.is_file():
        raise BadFileError("it is neither a file nor a folder", "give an h5ad file or a zarr store")
    else:
        import h5py

        with h5py.File(path, "r") as file:
            check_hdf5(file)


def _check_folder(folder: Path) -> None:
    top, todo = folder.resolve(), [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                name = os.path.relpath(entry.path, folder)
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(top):
                    raise BadFileError(f"its {name} is a link to {os.readlink(entry.path)}, outside of it", _REMEDY)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif not entry.is_file() and not entry.is_dir():
                    raise BadFileError(
                        f"its {name} is neither a file nor a folder", "remove it, or copy the store again"
                    )


def check_hdf5(file: Any) -> None:
    """Do this for an opened HDF5 file; loads ``hdf5plugin``, if it is there, where a filter of its is used."""
    from h5py import h5d, h5g, h5l, h5o, h5z

    todo, seen, lacking = [("", file["/"].id)], set(), False
    while todo:
        where, group = todo.pop()
        for name in group:
            shown = f"{where}/{name.decode(errors='backslashreplace')}".lstrip("/")
            kind = group.links.get_info(name).type
            if kind == h5l.TYPE_SOFT:  # leads to what is looked at anyway
                continue
            if kind != h5l.TYPE_HARD:
                target = group.links.get_val(name)[0].decode(errors="backslashreplace") if kind == 64 else "elsewhere"
                raise BadFileError(f"its {shown} is an external link to {target}", _REMEDY)
            child = h5o.open(group, name)
            if isinstance(child, h5g.GroupID):
                if (address := h5o.get_info(child).addr) not in seen:
                    seen.add(address)
                    todo.append((shown, child))
            elif isinstance(child, h5d.DatasetID):
                properties = child.get_create_plist()
                if properties.get_layout() == h5d.VIRTUAL:
                    raise BadFileError(f"its {shown} is a virtual dataset, made of other files", _REMEDY)
                if properties.get_external_count():
                    outside = properties.get_external(0)[0].decode(errors="backslashreplace")
                    raise BadFileError(f"its {shown} lies in another file, {outside}", _REMEDY)
                filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
                lacking |= not all(map(h5z.filter_avail, filters))
    if lacking:
        with suppress(ImportError):
            import hdf5plugin  # noqa: F401
