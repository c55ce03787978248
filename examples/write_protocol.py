"""Write node/triton.protoset: Triton's gRPC protocol, taken from the package tritonclient, as compiled descriptors.

Any tool that reads descriptor sets can use it, such as grpcurl -protoset or buf.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2


def main() -> None:
    """Write the files in the order in which they import each other."""
    files = FileDescriptorSet()
    for module in (model_config_pb2, service_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    (Path(__file__).parent / "node" / "triton.protoset").write_bytes(files.SerializeToString())


if __name__ == "__main__":
    main()
