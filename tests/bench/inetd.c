/* Starts programs as inetd does, each on a connection of its own on which "primary\n" has been sent.
 *
 *   inetd time N PROGRAM [ARGUMENT...] [-- PROGRAM [ARGUMENT...]]...
 *       runs all programs in turn, N times, and prints a line for each run: the program's number, wall us (start to
 *       end of file), CPU us (user and system), minor page faults, peak memory KiB
 *   inetd count PROGRAM [ARGUMENT...]
 *       steps through its instructions and counts them: many virtual machines have no CPU counters
 *   inetd run PROGRAM [ARGUMENT...]
 *       runs it once, so that it can be traced */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Makes a TCP connection over loopback, with HAProxy's line already sent: client and server side. */
static void connection(int *client, int *server) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (void *)&address, length) || listen(listener, 1) || getsockname(listener, (void *)&address, &length))
        fail("listen");
    *client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(*client, (void *)&address, length)) fail("connect");
    if ((*server = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0) fail("accept");
    if (write(*client, "primary\n", 8) != 8) fail("write");
    close(listener);
}

static void become(int server, char **program) {
    char *environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    int nothing = open("/dev/null", O_WRONLY);
    dup2(server, 0);
    dup2(server, 1);
    dup2(nothing, 2);
    close(nothing);
    execve(program[0], program, environment);
    _exit(127);
}

static double microseconds(struct timespec t) { return t.tv_sec * 1e6 + t.tv_nsec / 1e3; }

static size_t reply(int client, char *buffer, size_t size) {
    size_t length = 0;
    ssize_t count;
    while ((count = read(client, buffer + length, size - length)) > 0) length += count;
    return length;
}

/* Ends the benchmark at any other reply, which would make the figures worthless. */
static void expect(char **program, int status, const char *said, size_t length) {
    if (status == 0 && length > 9 && !memcmp(said, "up ready ", 9) && said[length - 1] == '\n') return;
    fprintf(stderr, "%s: status %d, said %.*s\n", program[0], status, (int)length, said);
    exit(1);
}

static void spawn(int number, char **program) {
    int client, server, status;
    char buffer[256];
    struct timespec before, after;
    struct rusage used;
    connection(&client, &server);
    clock_gettime(CLOCK_MONOTONIC, &before);
    pid_t child = vfork();
    if (child < 0) fail("vfork");
    if (child == 0) become(server, program);
    close(server);
    size_t length = reply(client, buffer, sizeof buffer);
    clock_gettime(CLOCK_MONOTONIC, &after);
    close(client);
    if (wait4(child, &status, 0, &used) != child) fail("wait4");
    expect(program, status, buffer, length);
    double cpu = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 + used.ru_utime.tv_usec + used.ru_stime.tv_usec;
    printf("%d %.0f %.0f %ld %ld\n", number, microseconds(after) - microseconds(before), cpu, used.ru_minflt, used.ru_maxrss);
}

static void count(char **program) {
    int client, server, status;
    unsigned long long steps = 0;
    connection(&client, &server);
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        become(server, program);
    }
    close(server);
    waitpid(child, &status, 0);
    while (WIFSTOPPED(status)) {
        steps++;
        int signal = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
        if (ptrace(PTRACE_SINGLESTEP, child, 0, signal)) fail("ptrace");
        waitpid(child, &status, 0);
    }
    char said[256];
    expect(program, status, said, reply(client, said, sizeof said));
    printf("%llu\n", steps);
}

static void run(char **program) {
    int client, server, status;
    char said[256];
    connection(&client, &server);
    pid_t child = fork();
    if (child == 0) become(server, program);
    close(server);
    size_t length = reply(client, said, sizeof said);
    waitpid(child, &status, 0);
    expect(program, status, said, length);
}

int main(int argc, char **argv) {
    char **programs[16];
    int programs_count = 0, start;
    if (argc > 2 && !strcmp(argv[1], "count")) count(argv + 2);
    else if (argc > 2 && !strcmp(argv[1], "run")) run(argv + 2);
    else if (argc > 3 && !strcmp(argv[1], "time")) {
        for (int i = start = 3; i <= argc && programs_count < 16; i++)
            if (i == argc || !strcmp(argv[i], "--")) {
                argv[i] = NULL;
                programs[programs_count++] = argv + start;
                start = i + 1;
            }
        for (int round = atoi(argv[2]); round > 0; round--)
            for (int i = 0; i < programs_count; i++) spawn(i, programs[i]);
    } else {
        fprintf(stderr, "usage: inetd time N PROGRAM... [-- PROGRAM...]... | count PROGRAM... | run PROGRAM...\n");
        return 64;
    }
    return 0;
}
