// Loaded before all else into tritonserver and its models: gives what their heaps have free back to the system now and then, and keeps
// from the models what installation.py sets for tritonserver alone.
//
// glibc keeps free pages in the middle of a heap for good. After hours of bursts half of tritonserver's memory was such pages; each burst
// that was a little larger, or lay a little otherwise, added some. It has no setting for that, only this call.
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NO_THREAD_CACHES "glibc.malloc.tcache_count=0"  // as in installation.py

static void *trim(void *nothing) {
    const struct timespec pause = {5, 0};
    for (;;) {
        nanosleep(&pause, NULL);
        malloc_trim(0);
    }
    return nothing;
}

__attribute__((constructor)) static void start(void) {
    // glibc has read it by now; whatever this process starts shall not
    const char *tunables = getenv("GLIBC_TUNABLES");
    if (tunables != NULL && strcmp(tunables, NO_THREAD_CACHES) == 0) unsetenv("GLIBC_TUNABLES");
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    if (pthread_create(&thread, NULL, trim, NULL) == 0) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
