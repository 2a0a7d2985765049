"""What versions of meshnet have written: state directories, and all keys of etcd.

Each version has a directory: ``state/`` is a host's state directory less large files, and
``etcd.json`` what etcd had at the same moment.  `tests.recorded.record` made them; never edit them.
"""
