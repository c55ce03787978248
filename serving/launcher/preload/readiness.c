// Preloaded into tritonserver: the server says that it is not ready while the file exists that FIDO_NOT_READY_FILE names.
//
// The launcher makes the file when it is told to end, before the readers refuse new questions. Balancers and probes that ask Triton's own
// ports (HTTP /v2/health/ready, gRPC ServerReady and grpc.health.v1) so leave the server while it still answers what it has. Triton itself
// turns not ready only once it has begun to refuse the calls between its models, which is too late for the questions in flight.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

typedef void *(*is_ready_function)(void *, bool *);

void *TRITONSERVER_ServerIsReady(void *server, bool *ready) {
    is_ready_function next = (is_ready_function)dlsym(RTLD_NEXT, "TRITONSERVER_ServerIsReady");
    void *error = next(server, ready);
    const char *file = getenv("FIDO_NOT_READY_FILE");
    if (error == NULL && file != NULL && access(file, F_OK) == 0) *ready = false;
    return error;
}
