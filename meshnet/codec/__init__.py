"""JSON of the store's values: versioned, validated on read, one document a key.

Values in etcd are hostile input (design decision D14): whatever is there, `decode_…` either
returns a value of `meshnet.model` that is safe to act on or raises `BadValueError` saying why.
Fields that a newer version added are ignored; another ``v`` is refused.

There is one module for each kind of value; `document` has what they share.  Pure: imports no
socket, file, clock or trio.  Layout of the keys: `meshnet.store.mirror`.
"""
