"""List source clips and their captions, from local folders, tars, manifests and remote storage."""
