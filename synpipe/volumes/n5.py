"""Lists the scales of an N5 volume.

Format: https://github.com/saalfeldlab/n5.
"""

from synpipe.volumes.scales import ChunkedFormat, ReadDocument, Scale, scale_of_array

MAX_SCALES = 32


def list_n5_scales(read_document: ReadDocument) -> list[Scale]:
    """The array itself, or the arrays s0, s1 … of a group, which is how N5 writers name the scales."""
    attributes_by_folder = {"": read_document("attributes.json")}
    root = attributes_by_folder[""]
    if root is None or "dimensions" not in root:
        attributes_by_folder = {}
        for number in range(MAX_SCALES):
            attributes = read_document(f"s{number}/attributes.json")
            if attributes is None:
                break
            attributes_by_folder[f"s{number}"] = attributes
    return [
        scale_of_array(folder, {"driver": "n5"}, attributes, attributes.get("axes"), "xyz")
        for folder, attributes in attributes_by_folder.items()
        if attributes is not None
    ]


N5 = ChunkedFormat("n5", "`attributes.json`", list_n5_scales)
