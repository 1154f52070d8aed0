"""Codecs of bodies, one file each, found by listing this folder: a class `Body` that is a `sllm.wire.body.BodyCodec`."""
