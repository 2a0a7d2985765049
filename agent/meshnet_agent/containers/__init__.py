"""The local runtime: containers, images and volumes of this host."""
