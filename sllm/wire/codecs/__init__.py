"""Body codecs, one file each, found by listing this folder. Each file has a class `Body`, which is a `sllm.wire.body.BodyCodec`."""
