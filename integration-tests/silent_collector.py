"""An OpenTelemetry collector that takes traces over gRPC and forgets them. Prints its port; runs until it is ended."""

from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class SilentCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Says yes to everything."""

    def Export(self, request: object, context: object) -> trace_service_pb2.ExportTraceServiceResponse:
        """Take some spans."""
        return trace_service_pb2.ExportTraceServiceResponse()


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(SilentCollector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()
