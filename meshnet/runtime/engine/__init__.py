"""What runs a container: runc or crun under conmon, on overlayfs, in cgroups."""
