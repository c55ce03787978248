// Preloaded into tritonserver: resolves a deadlock of its gRPC streams, which a cancelled stream can cause.
//
// Triton serves all streams on one handler thread. When a stream is cancelled, the handler locks the request's mutex and then the stream's
// mutex (ModelStreamInferHandler::Process). A thread that sends a response locks the same two in the other order
// (ModelStreamInferHandler::StreamInferResponseComplete). On busy cores, once in some ten thousand cancelled streams, each waits for the
// other, and from then on no stream is served. Seen in Triton 2.51; later sources have the same order. Triton's own test hook,
// TRITONSERVER_DELAY_GRPC_RESPONSE=30 in the environment, makes the first cancelled stream do it.
//
// How it is resolved: a sender that has waited for long writes down which mutex it waits for. The handler, when it has waited for long,
// looks for a sender that owns the mutex it wants and waits for a mutex that the handler owns. If there is one, the handler unlocks that
// mutex, waits for the one that it wants, and locks the first again. The sender then runs first, as if the stream had been cancelled a
// moment later. The request lives through that: a sender never frees it but queues it for the handler.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_NS 20000000   // far longer than a thread that waits for nothing else keeps such a mutex
#define KIND_MASK 3            // the bits of glibc's __kind that hold the mutex type
#define MAX_WAITING_SENDERS 64 // further senders wait until one of these is through; their deadlocks are resolved then

typedef int (*lock_function)(pthread_mutex_t *);
typedef int (*clocklock_function)(pthread_mutex_t *, clockid_t, const struct timespec *);
typedef void *(*send_response_function)(void *, uint32_t, void *);
typedef void *(*send_flags_function)(void *, uint32_t);

// A sender that has waited for long. The entry exists from then until the sender has the mutex, so the mutex exists that long.
struct waiting_sender {
    int thread;              // kernel's thread id; 0: the entry is free
    pthread_mutex_t *mutex;  // that the sender waits for
};

static lock_function real_lock;
static clocklock_function real_clocklock;  // NULL before glibc 2.30
static struct waiting_sender waiting[MAX_WAITING_SENDERS];
static pthread_mutex_t waiting_mutex = PTHREAD_MUTEX_INITIALIZER;  // guards `waiting`; held for moments, nothing is locked inside
static __thread int sends_in_progress, own_thread;
static __thread struct waiting_sender *own_entry;

static void find_real_functions(void) {
    if (real_lock != NULL) return;
    real_clocklock = (clocklock_function)dlsym(RTLD_NEXT, "pthread_mutex_clocklock");
    real_lock = (lock_function)dlsym(RTLD_NEXT, "pthread_mutex_lock");
}

// The function that ours stands before; looked up once. Two threads that look it up at once find the same.
static void *next_of(void **known, const char *name) {
    void *found = __atomic_load_n(known, __ATOMIC_ACQUIRE);
    if (found == NULL) {
        found = dlsym(RTLD_NEXT, name);
        __atomic_store_n(known, found, __ATOMIC_RELEASE);
    }
    return found;
}

static int thread_id(void) {
    if (own_thread == 0) own_thread = (int)syscall(SYS_gettid);
    return own_thread;
}

static int owner_of(pthread_mutex_t *mutex) { return __atomic_load_n(&mutex->__data.__owner, __ATOMIC_RELAXED); }

static int lock_for_a_while(pthread_mutex_t *mutex) {
    const clockid_t clock = real_clocklock != NULL ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    struct timespec until;
    clock_gettime(clock, &until);
    until.tv_nsec += PATIENCE_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        ++until.tv_sec;
    }
    return real_clocklock != NULL ? real_clocklock(mutex, clock, &until) : pthread_mutex_timedlock(mutex, &until);
}

static void enter_waiting(pthread_mutex_t *mutex) {
    if (own_entry != NULL) return;
    real_lock(&waiting_mutex);
    for (int i = 0; own_entry == NULL && i < MAX_WAITING_SENDERS; ++i) {
        if (waiting[i].thread != 0) continue;
        own_entry = &waiting[i];
        own_entry->thread = thread_id();
        own_entry->mutex = mutex;
    }
    pthread_mutex_unlock(&waiting_mutex);
}

static void leave_waiting(void) {
    if (own_entry == NULL) return;
    real_lock(&waiting_mutex);
    own_entry->thread = 0;
    own_entry->mutex = NULL;
    pthread_mutex_unlock(&waiting_mutex);
    own_entry = NULL;
}

// A mutex of this thread that the owner of `wanted` waits for; NULL if there is none. That is a deadlock and stays one until this thread
// unlocks the mutex: its owner cannot get on meanwhile, so the answer is still true when this returns.
static pthread_mutex_t *deadlocked_with(pthread_mutex_t *wanted) {
    pthread_mutex_t *found = NULL;
    real_lock(&waiting_mutex);
    for (int i = 0; found == NULL && i < MAX_WAITING_SENDERS; ++i) {
        if (waiting[i].thread == 0 || waiting[i].mutex == wanted || owner_of(wanted) != waiting[i].thread) continue;
        if (owner_of(waiting[i].mutex) == thread_id()) found = waiting[i].mutex;
    }
    pthread_mutex_unlock(&waiting_mutex);
    return found;
}

int pthread_mutex_lock(pthread_mutex_t *mutex) {
    find_real_functions();
    if ((mutex->__data.__kind & KIND_MASK) != PTHREAD_MUTEX_RECURSIVE) return real_lock(mutex);  // both mutexes are recursive
    int failure = pthread_mutex_trylock(mutex);
    if (failure != EBUSY) return failure;
    while ((failure = lock_for_a_while(mutex)) == ETIMEDOUT) {
        if (sends_in_progress) {
            enter_waiting(mutex);
            continue;
        }
        pthread_mutex_t *own = deadlocked_with(mutex);
        if (own == NULL) continue;
        const unsigned depth = own->__data.__count;
        for (unsigned i = 0; i < depth; ++i) pthread_mutex_unlock(own);
        failure = real_lock(mutex);
        for (unsigned i = 0; i < depth; ++i) real_lock(own);
        break;
    }
    leave_waiting();
    return failure;
}

void *TRITONBACKEND_ResponseSend(void *response, uint32_t flags, void *error) {
    static void *real;
    const send_response_function send = (send_response_function)next_of(&real, "TRITONBACKEND_ResponseSend");
    ++sends_in_progress;
    void *failure = send(response, flags, error);
    --sends_in_progress;
    return failure;
}

void *TRITONBACKEND_ResponseFactorySendFlags(void *factory, uint32_t flags) {
    static void *real;
    const send_flags_function send = (send_flags_function)next_of(&real, "TRITONBACKEND_ResponseFactorySendFlags");
    ++sends_in_progress;
    void *failure = send(factory, flags);
    --sends_in_progress;
    return failure;
}

// Removes this library from LD_PRELOAD, so that the processes of the models, which tritonserver starts, do not load it.
__attribute__((constructor)) static void start(void) {
    find_real_functions();
    Dl_info here;
    const char *preload = getenv("LD_PRELOAD");
    char *words = preload == NULL ? NULL : strdup(preload), *kept = preload == NULL ? NULL : calloc(strlen(preload) + 1, 1);
    if (words != NULL && kept != NULL && dladdr((void *)start, &here) != 0 && here.dli_fname != NULL) {
        char *rest = words;
        for (char *word = strtok_r(words, " :", &rest); word != NULL; word = strtok_r(NULL, " :", &rest)) {
            if (strcmp(word, here.dli_fname) == 0) continue;
            if (kept[0] != '\0') strcat(kept, ":");
            strcat(kept, word);
        }
        if (kept[0] == '\0') {
            unsetenv("LD_PRELOAD");
        } else {
            setenv("LD_PRELOAD", kept, 1);
        }
    }
    free(words);
    free(kept);
}
