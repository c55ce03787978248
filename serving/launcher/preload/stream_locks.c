// Loaded before all else into tritonserver: keeps a cancelled gRPC stream from stopping all streams for good.
//
// Triton has one thread for all streams. When a stream is cancelled, that thread takes the lock of its request and then the lock of the
// stream (ModelStreamInferHandler::Process). A thread that sends a response takes the same two in the other order
// (StreamInferResponseComplete). Once in some ten thousand cancelled streams, on busy cores, both wait for each other, and no stream is
// served any more. Seen in 2.51; the order is the same in later sources. With TRITONSERVER_DELAY_GRPC_RESPONSE=30 in its environment, of
// Triton's own tests, the first stream that is cancelled does it.
//
// Here a sender that waits for long says for what. A thread that holds that and waits for what the sender holds gives its lock up until the
// sender is through: as if the stream had been cancelled a moment later.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_NS 20000000  // far longer than a thread that waits for no other holds such a lock
#define KIND_MASK 3           // of glibc's __kind: the rest are flags
#define MOST_WAITING 64       // more senders that wait for long at once go without being heard, until one of them is through

typedef int (*of_mutex)(pthread_mutex_t *);
typedef void *(*send_response)(void *, uint32_t, void *);
typedef void *(*send_flags)(void *, uint32_t);

static of_mutex real_lock;
static __thread int sending, own_id;
// Senders that have waited for long, by their threads' ids, and what for.
static atomic_int waiting[MOST_WAITING];
static _Atomic(pthread_mutex_t *) wanted[MOST_WAITING];
static __thread int own_place = -1;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static int thread_id(void) {
    if (own_id == 0) own_id = (int)syscall(SYS_gettid);
    return own_id;
}

static int lock_in_time(pthread_mutex_t *mutex) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += PATIENCE_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        ++until.tv_sec;
    }
    return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
}

static void say(pthread_mutex_t *mutex) {
    for (int i = 0; own_place < 0 && i < MOST_WAITING; ++i) {
        int nobody = 0;
        if (!atomic_compare_exchange_strong(&waiting[i], &nobody, thread_id())) continue;
        atomic_store(&wanted[i], mutex);
        own_place = i;
    }
}

static void have(void) {
    if (own_place < 0) return;
    atomic_store(&wanted[own_place], NULL);
    atomic_store(&waiting[own_place], 0);
    own_place = -1;
}

// The lock of this thread that the holder of the one it waits for waits for; NULL if there is none.
static pthread_mutex_t *in_the_way(pthread_mutex_t *mutex) {
    for (int i = 0; i < MOST_WAITING; ++i) {
        pthread_mutex_t *mine = atomic_load(&wanted[i]);
        const int sender = atomic_load(&waiting[i]);
        if (mine == NULL || mine == mutex || mutex->__data.__owner != sender) continue;
        if (mine->__data.__owner == thread_id()) return mine;
    }
    return NULL;
}

int pthread_mutex_lock(pthread_mutex_t *mutex) {
    if (real_lock == NULL) real_lock = (of_mutex)next("pthread_mutex_lock");
    if ((mutex->__data.__kind & KIND_MASK) != PTHREAD_MUTEX_RECURSIVE) return real_lock(mutex);
    int failure = pthread_mutex_trylock(mutex);
    if (failure != EBUSY) return failure;
    while ((failure = lock_in_time(mutex)) == ETIMEDOUT) {
        if (sending) {
            say(mutex);
            continue;
        }
        pthread_mutex_t *mine = in_the_way(mutex);
        if (mine == NULL) continue;
        const unsigned times = mine->__data.__count;
        for (unsigned i = 0; i < times; ++i) pthread_mutex_unlock(mine);
        failure = real_lock(mutex);
        for (unsigned i = 0; i < times; ++i) real_lock(mine);
        break;
    }
    if (sending) have();
    return failure;
}

void *TRITONBACKEND_ResponseSend(void *response, uint32_t flags, void *error) {
    static send_response real;
    if (real == NULL) real = (send_response)next("TRITONBACKEND_ResponseSend");
    ++sending;
    void *failure = real(response, flags, error);
    --sending;
    return failure;
}

void *TRITONBACKEND_ResponseFactorySendFlags(void *factory, uint32_t flags) {
    static send_flags real;
    if (real == NULL) real = (send_flags)next("TRITONBACKEND_ResponseFactorySendFlags");
    ++sending;
    void *failure = real(factory, flags);
    --sending;
    return failure;
}
