"""What versions of meshnet have written: state directories, and all keys of etcd.

One directory a version: ``state/`` is a host's state directory less what is large, ``etcd.json``
what etcd had at the same moment.  Made by `tests.recorded.record`, never changed by hand.
"""
