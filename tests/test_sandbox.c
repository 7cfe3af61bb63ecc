/* SPDX-License-Identifier: MIT */
/*
 * ==== examples ==== the sandbox
 *
 * What sandbox_enter() refuses and what it leaves, call by call, in a process of its own; a device whose callback tries to open a
 * file; and the example devices with --sandbox, which serve as without.
 */
#include "caller.h"

#include "examples/sandbox.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <time.h>

/* ThreadSanitizer's own thread needs more than a device. */
#if defined(SANDBOX_ARCH) && !defined(__SANITIZE_THREAD__)
static bool is_possible(void) { return true; }
#else
static bool is_possible(void) { return false; }
#endif

/* ---- call by call ------------------------------------------------------------------------------------------------------ */

/* Runs body in a sandboxed child, and returns its status as waitpid() gives it. */
static int in_sandbox(int (*body)(void))
{
    int status;
    fflush(NULL);
    pid_t pid = fork();
    must(pid);
    if (pid == 0) {
        int err = sandbox_enter();
        _exit(err ? 99 : body());
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status;
}

/* The number of the first of the calls that was not refused; 0: all were. */
#define REFUSED(number, call) \
    do { \
        errno = 0; \
        if ((long)(call) != -1 || errno != EPERM) \
            return number; \
    } while (0)

static int file_before, pipe_before[2];

static int try_forbidden(void)
{
    char *none[] = {NULL};
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/dev/null"};
    REFUSED(1, open("/dev/null", O_RDONLY));
    REFUSED(2, open("/tmp/vfu-sandbox", O_WRONLY | O_CREAT, 0600));
    REFUSED(3, socket(AF_UNIX, SOCK_STREAM, 0));
    REFUSED(4, connect(pipe_before[0], (struct sockaddr *)&address, sizeof(address)));
    REFUSED(5, bind(pipe_before[0], (struct sockaddr *)&address, sizeof(address)));
    REFUSED(6, execve("/bin/true", none, none));
    REFUSED(7, syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
    REFUSED(8, kill(getppid(), 0));
    REFUSED(9, syscall(SYS_tgkill, 1, 1, 0));
    REFUSED(10, unlink("/tmp/vfu-sandbox"));
    REFUSED(11, rename("/tmp/vfu-sandbox", "/tmp/vfu-sandbox-2"));
    REFUSED(12, mkdir("/tmp/vfu-sandbox", 0700));
    REFUSED(13, chdir("/"));
    REFUSED(14, syscall(SYS_mount, "none", "/", "tmpfs", 0, 0));
    REFUSED(15, ptrace(PTRACE_TRACEME, 0, 0, 0));
    REFUSED(16, prctl(PR_SET_DUMPABLE, 1));
    REFUSED(17, setuid(getuid()));
    REFUSED(18, syscall(SYS_seccomp, 0, 0, 0));
    REFUSED(19, ioctl(file_before, TIOCSTI, "x"));
    REFUSED(20, fcntl(pipe_before[0], F_SETOWN, 1));
    REFUSED(21, mprotect((void *)((uintptr_t)&try_forbidden & ~(uintptr_t)4095), 4096, PROT_READ | PROT_WRITE | PROT_EXEC));
    if (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, file_before, 0) != MAP_FAILED || errno != EPERM)
        return 22;
    REFUSED(23, memfd_create("sandbox", 0));
    REFUSED(24, syscall(SYS_io_uring_setup, 1, 0));
    REFUSED(25, syscall(SYS_process_vm_readv, getppid(), 0, 0, 0, 0, 0));
    REFUSED(26, syscall(SYS_bpf, 0, 0, 0));
    REFUSED(27, syscall(SYS_pidfd_open, getppid(), 0));
    REFUSED(28, syscall(SYS_perf_event_open, 0, 0, 0, 0, 0));
    REFUSED(29, sendto(pipe_before[0], "x", 1, 0, NULL, 0));
    REFUSED(30, truncate("/tmp/vfu-sandbox", 0));
    return 0;
}

static sem_t never;
static int try_allowed(void)
{
    uint8_t bytes[64] = {1};
    struct stat st;
    struct timespec soon = {.tv_nsec = 1000}, past = {0};
    struct pollfd ready = {.fd = pipe_before[1], .events = POLLOUT};
    if (write(pipe_before[1], bytes, 8) != 8 || read(pipe_before[0], bytes, 8) != 8)
        return 1;
    if (pwrite(file_before, bytes, 64, 0) != 64 || pread(file_before, bytes, 64, 0) != 64 || fdatasync(file_before))
        return 2;
    if (fstat(file_before, &st) || st.st_size != 4096)
        return 3;
    uint8_t *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file_before, 0);
    if (shared == MAP_FAILED || shared[0] != 1 || munmap(shared, 4096))
        return 4;
    uint8_t *large = malloc(16 << 20);
    if (!large)
        return 5;
    memset(large, 1, 16 << 20);
    free(large);
    if (poll(&ready, 1, 0) != 1 || ppoll(&ready, 1, &soon, NULL) != 1)
        return 6;
    if (clock_gettime(CLOCK_MONOTONIC, &soon) || nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL))
        return 7;
    if (fcntl(pipe_before[0], F_GETFL) < 0 || fcntl(file_before, F_GET_SEALS) < 0)
        return 8;
    if (sem_timedwait(&never, &past) == 0 || errno != ETIMEDOUT)
        return 9;
    return 0;
}

START_TEST(forbidden_and_allowed)
{
    if (!is_possible())
        return;
    file_before = memfd("sandbox", PAGE, F_SEAL_SHRINK);
    must(pipe(pipe_before));
    must(sem_init(&never, 0, 0));
    int status = in_sandbox(try_forbidden);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "forbidden: status %#x", (unsigned)status);
    status = in_sandbox(try_allowed);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "allowed: status %#x", (unsigned)status);
    close(file_before);
    close(pipe_before[0]);
    close(pipe_before[1]);
}
END_TEST

#if defined(__x86_64__) && !defined(__ILP32__)
static int call_as_32_bits(void)
{
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L /* getpid */) : "memory"); /* getpid would be harmless */
    return 1;
}

static int call_as_x32(void)
{
    syscall(0x40000000 + SYS_getpid);
    return 1;
}

START_TEST(other_conventions_end_it)
{
    if (!is_possible())
        return;
    int status = in_sandbox(call_as_32_bits);
    ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS, "status %#x", (unsigned)status);
    status = in_sandbox(call_as_x32);
    ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS, "status %#x", (unsigned)status);
}
END_TEST
#endif

static sem_t go, gone;
static atomic_int refused_in_thread;
static void *open_in_thread(void *arg)
{
    (void)arg;
    while (sem_wait(&go) < 0) {
    }
    pthread_attr_t attr;
    int err = pthread_getattr_np(pthread_self(), &attr); /* as thread and sanitizer libraries do first of all */
    if (!err)
        pthread_attr_destroy(&attr);
    atomic_store(&refused_in_thread, err ? -err : open("/dev/null", O_RDONLY) < 0 ? errno : 0);
    sem_post(&gone);
    return NULL;
}

/* Threads that were there before are in it, too, and have what a thread needs that has just started. */
START_TEST(all_threads)
{
    if (!is_possible())
        return;
    int status;
    fflush(NULL);
    pid_t pid = fork();
    must(pid);
    if (pid == 0) {
        pthread_t thread;
        sem_init(&go, 0, 0);
        sem_init(&gone, 0, 0);
        if (pthread_create(&thread, NULL, open_in_thread, NULL) || sandbox_enter())
            _exit(99);
        sem_post(&go);
        while (sem_wait(&gone) < 0) {
        }
        _exit(atomic_load(&refused_in_thread) == EPERM ? 0 : 1);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", (unsigned)status);
}
END_TEST

/* ---- a device that does what it must not ------------------------------------------------------------------------------- */

static int read_a_file(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    (void)ctx, (void)region;
    memset(buf, 0x11, len);
    if (offset)
        return 0;
    return open("/etc/passwd", O_RDONLY) < 0 ? -errno : 0;
}

/* The call is refused, the client is told, and the device lives on. */
START_TEST(device_that_opens_a_file)
{
    if (!is_possible())
        return;
    int pair[2], status;
    vfu_client *client;
    uint8_t bytes[4];
    make_pair(pair);
    fflush(NULL);
    pid_t pid = fork();
    must(pid);
    if (pid == 0) {
        vfu_dev *dev;
        vfu_dev_desc desc = {.pci = {.vendor = 1, .bar = {{.size = 4096}}},
                             .callbacks = {.region_read = read_a_file},
                             .logger = {.write = ignore_log}};
        close(pair[1]);
        if (vfu_dev_create(&dev, &desc) || vfu_dev_attach(dev, pair[0]) || sandbox_enter())
            _exit(99);
        int err = vfu_dev_run(dev);
        _exit(err == -ENOTCONN ? 0 : 1);
    }
    close(pair[0]);
    ck_assert_int_eq(vfu_client_attach(&client, pair[1], NULL), 0);
    ck_assert_int_eq(vfu_client_region_read(client, 0, 0, bytes, 4), -EPERM);
    ck_assert_int_eq(vfu_client_region_read(client, 0, 4, bytes, 4), 0);
    ck_assert_uint_eq(bytes[0], 0x11);
    vfu_client_destroy(client);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", (unsigned)status);
}
END_TEST

/* ---- the example devices ----------------------------------------------------------------------------------------------- */

/* A line of /proc/PID/status, as a number */
static int status_of(pid_t pid, const char *name)
{
    char path[32], line[256];
    int value = -1;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof(line), file))
        if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
            value = atoi(line + strlen(name) + 1);
    fclose(file);
    return value;
}

static const char *const devices[][4] = {
    {"dma_engine", NULL},
    {"serial", NULL},
    {"nvme", "--image=/tmp/vfu-sandbox.img", "--size=1M", NULL},
};

/* Starts it on a listening socket, sandboxed. */
static pid_t start_sandboxed(const char *const device[4], struct sockaddr_un *address, socklen_t *len)
{
    char path[4096], option[32];
    const char *examples = getenv("VFU_EXAMPLES");
    int sock = listener(address, len), line[2];
    snprintf(path, sizeof(path), "%s/%s", examples && *examples ? examples : "build/examples", device[0]);
    make_pair(line);
    fflush(NULL);
    pid_t pid = fork();
    must(pid);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fcntl(sock, F_SETFD, 0);
        dup2(line[0], STDIN_FILENO); /* nothing comes from there */
        snprintf(option, sizeof(option), "--fd=%d", sock);
        setenv("ASAN_OPTIONS", "detect_leaks=0", 1); /* its search for leaks is another process */
        execl(path, path, option, "--sandbox", device[1], device[2], (char *)NULL);
        _exit(127);
    }
    close(sock);
    close(line[0]);
    close(line[1]);
    return pid;
}

static bool is_built(const char *name)
{
    char path[4096];
    const char *examples = getenv("VFU_EXAMPLES");
    snprintf(path, sizeof(path), "%s/%s", examples && *examples ? examples : "build/examples", name);
    return access(path, X_OK) == 0;
}

/* What any client asks any device, twice, and an orderly end. */
START_TEST(sandboxed_devices)
{
    struct sockaddr_un address;
    socklen_t len;
    int status, events[2] = {event(), event()}, sealed = memfd("sandbox", 16 * PAGE, F_SEAL_SHRINK),
                open_file = memfd("sandbox", PAGE, 0);
    static uint8_t memory[16 * PAGE];
    if (!is_possible() || !is_built(devices[_i][0])) {
        close_fds(events, 2);
        close(sealed);
        close(open_file);
        return;
    }
    pid_t pid = start_sandboxed(devices[_i], &address, &len);
    for (unsigned round = 0; round < 2; round++) {
        vfu_client *client;
        vfu_wire_device_info info;
        vfu_client_region region;
        uint8_t config[256];
        ck_assert_int_eq(vfu_client_attach(&client, connect_to(&address, len), NULL), 0);
        ck_assert_int_eq(vfu_client_info(client, &info), 0);
        ck_assert_int_eq(status_of(pid, "Seccomp"), 2);
        ck_assert_int_eq(status_of(pid, "NoNewPrivs"), 1);
        for (uint32_t i = 0; i < info.num_regions; i++) {
            ck_assert_int_eq(vfu_client_region_info(client, i, &region), 0);
            if (region.fd >= 0)
                close(region.fd);
        }
        ck_assert_int_eq(vfu_client_region_read(client, VFU_PCI_REGION_CONFIG, 0, config, sizeof(config)), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, 0, 16 * PAGE, 3, memory, sealed, 0), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, 1 << 20, PAGE, 3, memory, open_file, 0), 0);
        ck_assert_int_eq(vfu_client_dma_map(client, 1 << 21, PAGE, 3, memory, -1, 0), 0);
        ck_assert_int_eq(vfu_client_irq_assign(client, VFU_PCI_IRQ_ERR, 0, 1, events), 0);
        ck_assert_int_eq(vfu_client_reset(client), 0);
        if (_i == 0) { /* a copy from each kind of memory to each other */
            static const uint64_t places[] = {0, 1 << 20, 1 << 21};
            for (unsigned k = 0; k < 9; k++)
                ck_assert_int_eq(copy_by_engine(client, places[k % 3] + 2048, places[k / 3], 1024), 0);
        }
        ck_assert_int_eq(vfu_client_dma_unmap(client, 0, UINT64_C(1) << 40), 3);
        vfu_client_destroy(client);
    }
    must(kill(pid, SIGTERM));
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", (unsigned)status);
    unlink("/tmp/vfu-sandbox.img");
    close_fds(events, 2);
    close(sealed);
    close(open_file);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("sandbox");
    TCase *tc = tcase_create("sandbox");
    tcase_add_test(tc, forbidden_and_allowed);
#if defined(__x86_64__) && !defined(__ILP32__)
    tcase_add_test(tc, other_conventions_end_it);
#endif
    tcase_add_test(tc, all_threads);
    tcase_add_test(tc, device_that_opens_a_file);
    tcase_add_loop_test(tc, sandboxed_devices, 0, (int)COUNT(devices));
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
