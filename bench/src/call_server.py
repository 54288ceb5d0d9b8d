"""gRPC server with one unary method: the answer is the request.

usage: call_server.py CERT KEY ADDRESS PORT METHOD
"""

import sys
from concurrent import futures

import grpc

cert, key, address, port, method = sys.argv[1:]
echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)


class Handlers(grpc.GenericRpcHandler):
    def service(self, details):
        return echo if details.method == method else None


with open(cert, "rb") as chain, open(key, "rb") as secret:
    credentials = grpc.ssl_server_credentials([(secret.read(), chain.read())])
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers([Handlers()])
server.add_secure_port(f"{address}:{port}", credentials)
server.start()
server.wait_for_termination()
