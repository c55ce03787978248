// Preloaded into tritonserver and the processes of its models: every few seconds it returns the heap's free pages to the system.
//
// glibc returns free memory at the end of a heap, but keeps free pages in its middle for good. After hours of bursts half of tritonserver's
// memory was such pages, and each larger or differently shaped burst added some. glibc has no setting for this, only a function to call.
//
// It also removes a setting that environment.py makes for tritonserver alone from the environment of the processes that tritonserver starts.
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PERIOD_S 5
#define NO_THREAD_CACHES "glibc.malloc.tcache_count=0"  // as in environment.py

static void *trim(void *unused) {
    const struct timespec period = {PERIOD_S, 0};
    for (;;) {
        nanosleep(&period, NULL);
        malloc_trim(0);
    }
    return unused;
}

__attribute__((constructor)) static void start(void) {
    // glibc has read the variable before this runs, so only children lose it.
    const char *tunables = getenv("GLIBC_TUNABLES");
    if (tunables != NULL && strcmp(tunables, NO_THREAD_CACHES) == 0) unsetenv("GLIBC_TUNABLES");
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the program's own threads handle its signals
    if (pthread_create(&thread, NULL, trim, NULL) == 0) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
