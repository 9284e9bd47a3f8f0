/* longline: a long line between two network namespaces, for kernels without tc-netem.
 *
 * Two TUN devices, one in each namespace, and one thread for each direction between them. A packet that comes in may be
 * lost by chance; else it waits for its turn at the line's rate, then for the line's delay, and goes out. What would wait
 * for its turn longer than the queue allows is dropped, as a router's full buffer does it.
 *
 *   longline NS_A NS_B [delay-ms=50] [rate-mbit=200] [loss=0.01] [queue-ms=100] [mtu=1500] [seed=1]
 *
 * Delay is one way, loss a share of 1 each way; rate 0 is no limit. NS_A is 10.77.0.1, NS_B 10.77.0.2. It prints "ready"
 * once both ends are up, and what it carried when SIGTERM ends it. SIGUSR1 cuts the line, SIGUSR2 joins it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 65536 /* packets on the way, each direction */
#define SLOT_BYTES 9216

struct slot {
    int64_t due;
    uint32_t len;
    unsigned char bytes[SLOT_BYTES];
};

struct way {
    const char *name;
    int from, to;
    uint64_t chance; /* state of the random numbers */
    int64_t free_at; /* when the line has sent what it took so far */
    uint64_t carried, lost, dropped;
    uint32_t first, count;
    struct slot *slots;
};

static double delay_ms = 0, rate_mbit = 0, loss = 0, queue_ms = 100, mtu = 1500, seed = 1;
static atomic_int is_cut, is_over;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* splitmix64: every seed gives an unrelated row of numbers, so that both directions lose different packets. */
static double by_chance(struct way *w) {
    uint64_t z = (w->chance += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static void take(struct way *w) {
    for (;;) {
        /* Read into the next free slot at once: what is lost or dropped just does not keep it. */
        struct slot *s = &w->slots[(w->first + w->count) % SLOTS];
        ssize_t n = read(w->from, s->bytes, SLOT_BYTES);
        if (n <= 0) return;
        int64_t now = clock_ns();
        if (is_cut || by_chance(w) < loss) {
            w->lost++;
            continue;
        }
        int64_t start = w->free_at > now ? w->free_at : now;
        if (w->count + 1 >= SLOTS || (rate_mbit > 0 && start - now > (int64_t)(queue_ms * 1e6))) {
            w->dropped++;
            continue;
        }
        w->free_at = start + (rate_mbit > 0 ? (int64_t)((double)n * 8000 / rate_mbit) : 0);
        s->due = w->free_at + (int64_t)(delay_ms * 1e6);
        s->len = (uint32_t)n;
        w->count++;
    }
}

static void give(struct way *w) {
    while (w->count > 0) {
        struct slot *s = &w->slots[w->first];
        if (s->due > clock_ns()) return;
        if (!is_cut && write(w->to, s->bytes, s->len) == (ssize_t)s->len) w->carried++;
        else w->dropped++;
        w->first = (w->first + 1) % SLOTS;
        w->count--;
    }
}

static void *carry(void *arg) {
    struct way *w = arg;
    prctl(PR_SET_TIMERSLACK, 1000ul); /* a wake-up 50 µs late, as by default, would be three packets' time */
    while (!is_over) {
        int64_t left = w->count > 0 ? w->slots[w->first].due - clock_ns() : 200000000;
        if (left < 0) left = 0;
        struct timespec t = {left / 1000000000, left % 1000000000};
        struct pollfd p = {.fd = w->from, .events = POLLIN};
        ppoll(&p, 1, &t, NULL);
        if (p.revents) take(w);
        give(w);
    }
    return NULL;
}

/* Makes the TUN device of one end. The namespace is entered only for that: a device keeps its own. */
static int make_end(const char *ns, const char *own, const char *other) {
    char text[512];
    snprintf(text, sizeof text, "/run/netns/%s", ns);
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), there = open(text, O_RDONLY | O_CLOEXEC);
    if (there < 0) fail(text);
    if (setns(there, CLONE_NEWNET)) fail("entering the namespace");
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) fail("/dev/net/tun");
    struct ifreq device = {.ifr_flags = IFF_TUN | IFF_NO_PI, .ifr_name = "longline"};
    if (ioctl(fd, TUNSETIFF, &device)) fail("making a TUN device");
    snprintf(text, sizeof text, "ip link set lo up && ip addr add %s peer %s dev longline && ip link set longline mtu %.0f txqueuelen 10000 up", own, other, mtu);
    if (system(text)) exit(1);
    if (setns(home, CLONE_NEWNET)) fail("coming back");
    close(home);
    close(there);
    return fd;
}

static void read_option(const char *arg) {
    struct { const char *name; double *value; } known[] = {{"delay-ms", &delay_ms}, {"rate-mbit", &rate_mbit}, {"loss", &loss},
        {"queue-ms", &queue_ms}, {"mtu", &mtu}, {"seed", &seed}};
    const char *equals = strchr(arg, '=');
    for (size_t i = 0; equals && i < sizeof known / sizeof *known; i++)
        if (strlen(known[i].name) == (size_t)(equals - arg) && !strncmp(known[i].name, arg, (size_t)(equals - arg))) {
            *known[i].value = atof(equals + 1);
            return;
        }
    fprintf(stderr, "longline: what is %s?\n", arg);
    exit(2);
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: longline NS_A NS_B [delay-ms=D] [rate-mbit=R] [loss=P] [queue-ms=Q] [mtu=M] [seed=S]\n");
        return 2;
    }
    for (int i = 3; i < argc; i++) read_option(argv[i]);
    if (mtu > SLOT_BYTES) {
        fprintf(stderr, "longline: an MTU is at most %d\n", SLOT_BYTES);
        return 2;
    }
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);

    int a = make_end(argv[1], "10.77.0.1", "10.77.0.2"), b = make_end(argv[2], "10.77.0.2", "10.77.0.1");
    struct way ways[2] = {{.name = "a to b", .from = a, .to = b, .chance = (uint64_t)seed}, {.name = "b to a", .from = b, .to = a, .chance = ~(uint64_t)seed}};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        ways[i].slots = malloc(sizeof(struct slot) * SLOTS);
        if (!ways[i].slots || pthread_create(&threads[i], NULL, carry, &ways[i])) fail("starting");
    }
    puts("ready");
    fflush(stdout);
    for (int s = 0; s != SIGTERM && s != SIGINT;) {
        if (sigwait(&signals, &s)) break;
        if (s == SIGUSR1) is_cut = 1;
        if (s == SIGUSR2) is_cut = 0;
    }
    is_over = 1;
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        printf("%s: %lu carried, %lu lost, %lu dropped\n", ways[i].name, ways[i].carried, ways[i].lost, ways[i].dropped);
    }
    return 0;
}
