"""Lists the scales of a volume in neuroglancer's precomputed format.

Format: https://github.com/google/neuroglancer/tree/master/src/datasource/precomputed.
"""

from synpipe.volumes.scales import ChunkedFormat, ReadDocument, Scale


def list_precomputed_scales(read_document: ReadDocument) -> list[Scale]:
    info = read_document("info")
    if info is None:
        return []
    return [
        Scale(
            scale["key"],
            ("x", "y", "z", "channel"),
            {"driver": "neuroglancer_precomputed", "scale_index": index},
            scale["resolution"][::-1],
            [a * b for a, b in zip(scale.get("voxel_offset", (0, 0, 0)), scale["resolution"], strict=True)][::-1],
        )
        for index, scale in enumerate(info["scales"])
    ]


PRECOMPUTED = ChunkedFormat("precomputed", "`info`", list_precomputed_scales)
